"""TRL's SFTTrainer, made to fit speech: what is different here from TRL 1.16 is in this file."""

from trl import SFTTrainer

from training.grpo_trainer import OutputsKeepTheirDtype, causal_lm, score_confined


class SpeechSFTTrainer(OutputsKeepTheirDtype, SFTTrainer):
    """SFTTrainer for a policy that `confine_head` was applied to: its losses are computed over the head's rows alone.

    Under FSDP2 TRL's own takes the head's bias for a parameter that is spread over processes, and logs losses that
    accelerate has rounded to half precision.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        outputs = ("log_probs", "entropy", "is_top1")  # TRL logs the last two
        score_confined(causal_lm(self.accelerator.unwrap_model(self.model)), temperature=1.0, outputs=outputs)
