"""The voice against the voice prompt: worked numbers, the gate, failures, one pass a batch, offload, train.py."""

import doctest
import json
import math

import datasets
import numpy as np
import pytest
import torch
from fake_rollouts import HummingCodec, Moved, PerfectScorer, call, ids, speech_scorer
from fake_speaker_encoder import save_speaker_encoder

import train
from common.cli import InputError
from reward_models import build_rewards, load_config, speaker_similarity
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.speaker_similarity import SpeakerSimilarityReward, similarity_reward
from speech.speaker_encoder import MIN_SECONDS, SpeakerEncoder
from speech.tokens import SAMPLE_RATE
from speech.whisper_scorer import Score

LOW, HIGH = [10] * 40, [50] * 40


class PitchEncoder:
    """A voice is the direction of (Hz, 200 Hz): a clip's zero crossings tell its tone."""

    device = torch.device("cpu")

    def __init__(self):
        self.embedded = []

    def embed(self, wavs):
        self.embedded.append(len(wavs))
        return np.array([self._embedding(wav) for wav in wavs], np.float32)

    def _embedding(self, wav):
        if len(wav) < MIN_SECONDS * SAMPLE_RATE or not np.isfinite(wav).all():
            return [np.nan, np.nan]
        hertz = (np.diff(np.sign(wav)) != 0).mean() * SAMPLE_RATE / 2
        return np.array([hertz, 200]) / math.hypot(hertz, 200)


class HalfWrong(PerfectScorer):
    """Every second transcript has three errors in four words."""

    def score(self, wavs, texts, languages, **options):
        scores = super().score(wavs, texts, languages, **options)
        return [Score("?", 0.75, 1.0, 3, 4) if i % 2 else score for i, score in enumerate(scores)]


def voice_scorer(**options):
    scorer = speech_scorer(**options)
    scorer.speaker_encoder = PitchEncoder()
    return scorer


def test_worked_numbers():
    assert doctest.testmod(speaker_similarity).failed == 0
    assert doctest.testmod(speaker_similarity).attempted >= 2
    assert similarity_reward(0.8, wer=0.5) == 0.8 and similarity_reward(0.8, wer=0.51) == 0.0


def test_the_voice_of_the_prompt_earns_most():
    # code n is a tone of 100 + 2 n Hz: 120 and 200 Hz. cos((120, 200), (200, 200)) = 64000 / (233.24 · 282.84) = 0.9701
    metrics = {}
    rewards = call(SpeakerSimilarityReward(voice_scorer()), [ids(LOW), ids(HIGH)], metrics, ref_codes=[LOW, LOW])
    assert rewards == [pytest.approx(1.0), pytest.approx(0.9701, abs=2e-3)]
    assert metrics["speaker_cosine"] == pytest.approx(np.mean(rewards))


def test_failed_rollouts_earn_nothing():
    batch = [ids(LOW), ids([]), ids(LOW, truncated=True), ids([63] * 40), ids([0] * 40), ids(LOW[:24])]
    rewards = call(SpeakerSimilarityReward(voice_scorer()), batch, ref_codes=[LOW] * 6)
    assert rewards == [pytest.approx(1.0), 0.0, 0.0, 0.0, 0.0, 0.0]  # the last is shorter than 0.5 s


def test_the_voice_counts_only_below_the_bound_on_wer():
    batch = [ids(LOW), ids(LOW)]

    def rewards(**parameters) -> list[float]:
        scorer = voice_scorer()
        scorer.whisper = HalfWrong()
        return call(SpeakerSimilarityReward(scorer, **parameters), batch, ref_codes=[LOW, LOW])

    assert rewards() == rewards(max_wer=0.74) == [pytest.approx(1.0), 0.0]
    assert rewards(max_wer=0.75) == [pytest.approx(1.0)] * 2


def test_each_prompt_is_embedded_once_and_rewards_share_the_batch():
    scorer = voice_scorer()
    rewards, weights = build_rewards(load_config("reward_models/speaker_similarity.json"), scorer)
    batch = [ids(LOW), ids(HIGH), ids(LOW), ids(HIGH)]
    for reward in rewards:
        call(reward, batch, ref_codes=[LOW, LOW, HIGH, HIGH])
    assert scorer.whisper.calls == 1
    assert scorer.codec.decoded == [4, 2]  # four rollouts, two prompts
    assert scorer.speaker_encoder.embedded == [6]
    assert weights == [1.0, 0.5]


def test_a_real_encoder_tells_the_rollout_that_is_its_prompt(tmp_path):
    scorer = speech_scorer()
    scorer.speaker_encoder = SpeakerEncoder.from_pretrained(save_speaker_encoder(tmp_path))
    same, other = call(SpeakerSimilarityReward(scorer), [ids(LOW), ids(HIGH)], ref_codes=[LOW, LOW])
    assert same == pytest.approx(1.0, abs=1e-5) and 0 <= other < same


def test_an_offloaded_encoder_is_on_its_device_only_while_it_scores():
    codec, whisper, encoder = HummingCodec(device=torch.device("meta")), PerfectScorer(), PitchEncoder()
    codec.model, whisper.model, encoder.model = Moved(), Moved(), Moved()
    embed, seen = encoder.embed, []
    encoder.embed = lambda wavs: seen.append(encoder.device.type) or embed(wavs)
    scorer = SpeechRolloutScorer(speech_scorer().tokens, codec, whisper, 2, offload=True, speaker_encoder=encoder)
    call(SpeakerSimilarityReward(scorer), [ids(LOW), ids(HIGH)], ref_codes=[LOW, LOW])
    assert seen == ["meta"]
    assert encoder.model.devices == ["cpu", "meta", "cpu"]
    assert whisper.model.devices == ["cpu", "meta", "cpu"]  # not a second time for the encoder
    assert encoder.device.type == codec.device.type == "cpu"


@pytest.mark.parametrize("max_wer", [-0.1, math.nan])
def test_bad_bounds(max_wer):
    with pytest.raises(InputError, match="max_wer: must be >= 0"):
        SpeakerSimilarityReward(None, max_wer)


def test_train_takes_rows_with_voice_prompts_and_refuses_others(tmp_path, capsys, caplog):
    codes = datasets.load_dataset("parquet", data_files="tiny/speech.parquet", split="train")
    codes = codes.filter(lambda row: row["ref_codes"] is not None).select(range(2))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({k: row[k] for k in ("text", "ref_text", "ref_codes")}) + "\n" for row in codes))
    flags = ["--config", "configs/tiny.yaml", "--max_steps", "1", "--num_generations", "4", "--sample_steps", "0"]
    flags += ["--per_device_train_batch_size", "8", "--reward_config", "reward_models/speaker_similarity.json"]
    flags += ["--save_strategy", "no", "--output_dir", str(tmp_path / "run")]
    encoder = save_speaker_encoder(tmp_path / "encoder")
    train.main(train.parse_args([*flags, "--dataset", str(rows), "--speaker_encoder", encoder]))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]
    assert 0 < log["rewards/speaker_similarity/mean"] <= log["speaker_cosine"] <= 1

    with pytest.raises(SystemExit) as stop:  # the shipped texts have none
        train.main(train.parse_args([*flags, "--output_dir", str(tmp_path / "refused")]))
    assert stop.value.code == 2
    message = "row 0: a reward compares with the row's voice prompt"
    assert message in caplog.text + capsys.readouterr().err
