"""TRL's SFTTrainer, made to fit speech: what is different here from TRL 1.16 is in this file."""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from training.scoring import OutputsKeepTheirDtype, causal_lm, score_confined


class SpeechSFTTrainer(OutputsKeepTheirDtype, SFTTrainer):
    """SFTTrainer for a policy that `confine_head` was applied to: its losses are computed over the head's rows alone.

    Under FSDP2 TRL's own takes the head's bias for a parameter that is spread over processes, and logs losses that
    accelerate has rounded to half precision.
    """

    _by_length = None  # the sampler of --train_sampling_strategy group_by_length

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        outputs = ("log_probs", "entropy", "is_top1")  # TRL logs the last two
        score_confined(causal_lm(self.accelerator.unwrap_model(self.model)), temperature=1.0, outputs=outputs)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self._by_length = SeededLengthGroupedSampler(sampler.batch_size, sampler.lengths, seed)
        return sampler

    def _run_epoch(self, *, epoch: int, **state):
        """transformers' own `set_epoch` reaches no sampler of a resumed epoch that several processes share."""
        if self._by_length is not None:
            self._by_length.epoch = epoch
        return super()._run_epoch(epoch=epoch, **state)


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """transformers', drawing each epoch's order by seed and epoch.

    Its own draws from the global state, which a resumed run has not restored by then: in its second epoch it would see
    the rows of the first one's order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
