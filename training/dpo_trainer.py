"""TRL's DPOTrainer, made to fit speech: what is different here from TRL 1.16 is in this file.

- Rows come as token ids (preference_rows.py): TRL would render chosen and rejected as closed assistant turns.
- Policy and reference are confined to speech codes and END, and scored over those rows of the head alone, by the same
  function as GRPO's rollouts (scoring.py).
"""

from datasets import Dataset
from trl import DPOTrainer

from speech.confined_head import confine_head
from training.scoring import OutputsKeepTheirDtype, causal_lm, score_confined


class SpeechDPOTrainer(OutputsKeepTheirDtype, DPOTrainer):
    """DPOTrainer for a policy that `confine_head` was applied to, and rows of `preference_rows`.

    The reference is the policy as it was at the start: loaded anew from its folder, or for a LoRA the base model or the
    adapter as it was, as in TRL.

    Args:
        allowed_ids: what that policy may say; the reference model, which TRL loads anew, is confined likewise.
    """

    def __init__(self, *args, allowed_ids: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")  # TRL logs the last two
        outputs += ("log_sum_sq_probs",) if self.use_weighting else ()
        score_confined(causal_lm(self.accelerator.unwrap_model(self.model)), temperature=1.0, outputs=outputs)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            confine_head(reference, allowed_ids)
            score_confined(reference, temperature=1.0, outputs=outputs)
            # accelerate has prepared it already, and its autocast went with the forward that was replaced
            reference.forward = self.accelerator.autocast()(reference.forward)

    def _prepare_dataset(self, dataset: Dataset, *_) -> Dataset:
        return dataset
