"""SFT: a run resumed in its second epoch sees the rows that it would have seen."""

import json

import train
from training.sft_trainer import SeededLengthGroupedSampler


def test_each_epoch_has_an_order_of_its_own_whenever_it_begins():
    def order(epochs: range) -> list[list[int]]:
        sampler = SeededLengthGroupedSampler(4, lengths=[5, 9, 2, 7] * 10, seed=1)
        orders = []
        for epoch in epochs:
            sampler.epoch = epoch
            orders.append(list(sampler))
        return orders

    whole = order(range(3))
    assert [sorted(one) for one in whole] == [list(range(40))] * 3 and whole[0] != whole[1] != whole[2]
    assert order(range(1, 3)) == whole[1:]


def test_resumed_in_the_second_epoch_is_uninterrupted(tmp_path):
    rows = [json.loads(line) for line in open("tiny/texts/train.jsonl", encoding="utf-8")][:12]
    rows = [{"text": row["text"], "audio_codes": [7 + i] * (10 + 3 * i)} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", "configs/tiny_sft.yaml", "--dataset", str(tmp_path / "rows.jsonl"), "--max_steps", "6"]
    flags += "--per_device_train_batch_size 4 --save_strategy steps --save_steps 4 --use_cpu true".split()
    weights = {}
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        train.main(train.parse_args([*flags, "--output_dir", str(folder)]))
        if name == "resumed":
            (folder / "model.safetensors").unlink()
            (folder / "checkpoint-6" / "trainer_state.json").unlink()  # as if interrupted while it was written
            train.main(train.parse_args([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "true"]))
        weights[name] = (folder / "model.safetensors").read_bytes()
    assert weights["resumed"] == weights["whole"]
