"""Sampling by transformers' generate from an exported policy."""
import time

from peer_protocol import serve, silence


class Peer:
    def __init__(self, policy, threads, new_tokens):
        import torch
        from transformers import AutoModelForCausalLM
        silence()
        torch.set_num_threads(threads)
        self.new_tokens = new_tokens
        self.model = AutoModelForCausalLM.from_pretrained(policy).eval()

    def versions(self):
        import torch
        import transformers
        name = f"transformers {transformers.__version__} generate"
        return {"name": name, "threads": torch.get_num_threads()}

    def time(self, prompts, seed):
        """prompts: of one length -> seconds and the new tokens"""
        import torch
        torch.manual_seed(seed)
        tokens = torch.tensor(prompts)
        mask = torch.ones_like(tokens)
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, pad_token_id=0)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": out[:, tokens.shape[1]:].tolist()}


if __name__ == "__main__":
    serve(Peer)
