"""TRL's experimental PPOTrainer on an exported policy and an exported reward model.

One rollout an iteration; every minibatch is one step.  The settings are those of nanoreward where
the two have the same, and TRL's defaults otherwise.
"""
import time
from unittest import mock

from peer_protocol import serve, silence, training_arguments


class Peer:
    def __init__(self, policy, reward, threads, answers, max_new_tokens, minibatches):
        import torch
        silence()
        torch.set_num_threads(threads)
        self.policy = policy
        self.reward = reward
        self.answers = answers
        self.max_new_tokens = max_new_tokens
        self.minibatches = minibatches
        self.timed_trainer = None

    def versions(self):
        import torch
        import trl
        return {"name": f"TRL {trl.__version__} PPOTrainer", "threads": torch.get_num_threads()}

    def make_trainer(self, epochs, lr):
        """A PPOTrainer on fresh models, whose train() makes one iteration"""
        from datasets import Dataset
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
            PrinterCallback,
        )
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        args = PPOConfig(
            per_device_train_batch_size=self.answers, gradient_accumulation_steps=1,
            num_mini_batches=self.minibatches, num_ppo_epochs=epochs, total_episodes=self.answers,
            local_rollout_forward_batch_size=self.answers, response_length=self.max_new_tokens,
            stop_token="eos", temperature=1.0, kl_coef=0.05, cliprange=0.2, cliprange_value=0.2,
            gamma=1.0, lam=0.95, num_sample_generations=0,
            **training_arguments(f"{self.policy}.trl", lr))
        # The reward model's tokenizer: a padding token that is not EOS
        tokenizer = AutoTokenizer.from_pretrained(self.reward, padding_side="left")
        unused = Dataset.from_dict({"input_ids": [[0]] * self.answers})  # run_iteration has prompts
        trainer = PPOTrainer(
            args, tokenizer,
            model=AutoModelForCausalLM.from_pretrained(self.policy),
            ref_model=AutoModelForCausalLM.from_pretrained(self.policy),
            reward_model=AutoModelForSequenceClassification.from_pretrained(self.reward),
            value_model=AutoModelForSequenceClassification.from_pretrained(self.reward),
            train_dataset=unused, eval_dataset=unused)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run_iteration(self, trainer, prompts):
        """-> seconds"""
        batch = trainer.processing_class.pad({"input_ids": prompts}, return_tensors="pt")
        trainer.dataloader = [batch]
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    def time(self, prompts, epochs, lr):
        """The next iteration of one training run"""
        if self.timed_trainer is None:
            self.timed_trainer = self.make_trainer(epochs, lr)
        return {"seconds": self.run_iteration(self.timed_trainer, prompts)}

    def losses(self, prompts, responses, orders, epochs, lr):
        """Losses of the first iteration of a new run, on given responses, padded with EOS

        orders: of the rows, a list for each epoch, which are cut into minibatches
        """
        import numpy as np
        import torch
        from trl.experimental.ppo import ppo_trainer

        def given_responses(policy, queries, batch_size, pad_id, generation_config):
            tokens = torch.cat((queries, torch.tensor(responses)), 1)
            logits = ppo_trainer.forward(policy, tokens, pad_id).logits
            return tokens, logits[:, queries.shape[1] - 1:-1]

        next_order = iter(orders)

        def given_order(size):
            return np.array(next(next_order))

        trainer = self.make_trainer(epochs, lr)
        with mock.patch.object(ppo_trainer, "batch_generation", torch.no_grad()(given_responses)), \
                mock.patch.object(np.random, "permutation", given_order):
            self.run_iteration(trainer, prompts)
        record = trainer.state.log_history[-1]
        return {"policy": record["loss/policy_avg"], "value": record["loss/value_avg"]}


if __name__ == "__main__":
    serve(Peer)
