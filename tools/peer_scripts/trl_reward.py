"""TRL's RewardTrainer on an exported reward model and pairs of token ids."""
import time

from peer_protocol import serve, silence, training_arguments


class Peer:
    def __init__(self, model, threads, batch):
        import torch
        silence()
        torch.set_num_threads(threads)
        self.folder = model
        self.batch = batch

    def versions(self):
        import torch
        import trl
        return {"name": f"TRL {trl.__version__} RewardTrainer", "threads": torch.get_num_threads()}

    def train(self, chosen, rejected, lr, sampling):
        """Train the exported model for one epoch.  -> seconds, loss of each step"""
        from datasets import Dataset
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            PrinterCallback,
        )
        from trl import RewardConfig, RewardTrainer
        args = RewardConfig(
            per_device_train_batch_size=self.batch, num_train_epochs=1, max_length=512,
            weight_decay=0.1, max_grad_norm=1.0, logging_steps=1, logging_nan_inf_filter=False,
            train_sampling_strategy=sampling, **training_arguments(f"{self.folder}.trl", lr))
        trainer = RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(self.folder), args=args,
            train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
            processing_class=AutoTokenizer.from_pretrained(self.folder))
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        history = trainer.state.log_history
        return seconds, [record["loss"] for record in history if "loss" in record]

    def time(self, chosen, rejected, lr):
        """Batches are drawn at random, as TRL does unless told otherwise."""
        seconds, _ = self.train(chosen, rejected, lr, "random")
        return {"seconds": seconds}

    def losses(self, chosen, rejected, lr):
        """Batches in the order given"""
        _, losses = self.train(chosen, rejected, lr, "sequential")
        return {"losses": losses}


if __name__ == "__main__":
    serve(Peer)
