"""A task in three methods as a user would write it: chat rows for a model of `transformers`."""

import json
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, paths, tokenizer):
        self.rows = [json.loads(line) for path in paths for line in open(path)]
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        text = self.tokenizer.apply_chat_template(self.rows[index]["messages"], tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:40]
        return {"input_ids": ids, "labels": [-100] * (index % 7) + ids[index % 7 :]}


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.zeros(len(rows), longest, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(row["labels"])
    return batch


class ChatTask:
    model: Any
    tokenizer: Any
    amp_context: Any

    def __init__(self, cfg):
        self.cfg = cfg

    def build_dataloader(self, data_paths, eval_dataset=False):
        rows = Rows(data_paths, self.tokenizer)
        loader = DataLoader(rows, batch_size=4, shuffle=True, drop_last=True, collate_fn=collate)
        return loader, {"num_samples": len(rows)}

    def get_train_model_output(self, batch):
        with self.amp_context:
            return self.model(**batch).loss

    def get_eval_model_output(self, batch):
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        last = (
            batch["attention_mask"].sum(-1, keepdim=True) - 1
        )  # not padding, which depends on the batch
        choice = logits.argmax(-1).gather(1, last)
        return (choice % 2 == 0).sum()


class GeneratingTask(ChatTask):
    def get_eval_model_output(self, batch):
        right = total = 0
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            prompt = ids[: int(mask.sum())].unsqueeze(0)
            length = 1 + int(prompt[0, 0]) % 5
            answer = self.model.generate(prompt, max_new_tokens=length, do_sample=False)
            # Not right or wrong, but a number that another answer would change.
            right += int(answer[0, prompt.shape[1] :].sum()) % 97
            total += 97
        return right, total
