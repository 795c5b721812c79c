"""The preference model alone, and as a reward: worked numbers, batches, failures, one encoder pass, train.py."""

import doctest
import json

import numpy as np
import pytest
import torch
from fake_preference import random_features, small_model
from fake_rollouts import TOKENS, HummingCodec, call, ids
from fake_vowel import falling
from fake_whisper import save_random_whisper

import train
from common.cli import InputError
from reward_models import build_rewards, load_config, preference
from reward_models.preference import PreferenceModel, PreferenceReward, preference_reward, with_pitch_features
from reward_models.rollouts import SpeechRolloutScorer
from speech.pitch import PitchTrack, pitch_track
from speech.whisper_scorer import WhisperScorer

TEXTS = ["Is it so?", "It is *so*.", "今天天气很好。"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> WhisperScorer:
    return WhisperScorer(save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt"), device="cpu")


def test_worked_numbers():
    assert doctest.testmod(preference).failed == 0 and doctest.testmod(preference).attempted >= 2
    # sigmoid(−1) = 1 / (1 + e) = 0.2689, and bounds
    assert preference_reward(-1.0, wer=0.5) == pytest.approx(0.2689, abs=1e-4)
    assert preference_reward(-1.0, wer=0.51) == 0.0
    assert preference_reward(-1e6, wer=0.0) == 0.0 and preference_reward(1e6, wer=0.0) == 1.0
    assert preference_reward(3.0, wer=0.4, max_wer=0.3) == 0.0


def test_a_batch_has_the_scores_of_each_clip_alone():
    model = small_model()
    torch.nn.init.normal_(model.normalise.bias)  # as after training: padding would be more than zeros
    features = random_features([40, 3, 25])
    alone = [model.score([item], [text])[0] for item, text in zip(features, TEXTS, strict=True)]
    assert model.score(features, TEXTS) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 3
    assert np.isnan(model.score([None, features[0]], TEXTS[:2])).tolist() == [True, False]
    model.centre.fill_(2.0)
    assert model.score(features, TEXTS) == pytest.approx([score - 2 for score in alone], abs=1e-5)


def test_melody_beside_the_features():
    features = torch.randn(4, 2)
    # Three of the track's frames of 10 ms, two of them in the second frame of 20 ms, and one behind the features
    track = PitchTrack(
        np.array([0.021, 0.031, 0.065, 0.085]), np.array([80.0, 82, 84, 86]), np.array([-3.0, -5, -9, 0])
    )
    heard = with_pitch_features(features, track)
    assert torch.equal(heard[:, :2], features)
    expected = [[0, 0, 0], [1, -2 / 2, -4 / 5], [0, 0, 0], [1, 1 / 2, -9 / 5]]
    assert heard[:, 2:].tolist() == pytest.approx(np.array(expected))
    nothing = np.zeros(0)
    assert not with_pitch_features(features, PitchTrack(nothing, nothing, nothing))[:, 2:].any()


def test_a_higher_voice_has_the_same_melody():
    low, high = (with_pitch_features(torch.zeros(25, 1), pitch_track(falling(0.5, 1.5 * hz, hz))) for hz in (100, 140))
    voiced = (low[:, 1] * high[:, 1]).bool()  # a low voice is told two frames later than a high one
    assert voiced.sum() > 20 and low[voiced, 2].tolist() == pytest.approx(high[voiced, 2].tolist(), abs=0.2)
    assert low[voiced, 2][0] > 0.5 > -0.5 > low[voiced, 2][-1]


def test_the_last_place_is_1_however_long_the_item_is():
    """The slowest wave is half a one over the whole: its cosine is 1 at the start and -1 at the end."""
    model = small_model()
    there = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])
    slowest = model._place(there)[..., model.config["hidden_size"] // 2]
    half = 0.5**0.5
    assert slowest[0].tolist() == pytest.approx([1, half, 0, -half, -1], abs=1e-6)
    assert slowest[1, :3].tolist() == pytest.approx([1, 0, -1], abs=1e-6)


def test_text_and_speech_both_matter():
    model = small_model()
    [features] = random_features([20])
    scores = model.score([features, features, features.flip(0)], ["Is it so?", "Is it so.", "Is it so?"])
    assert abs(scores[0] - scores[1]) > 1e-4 and abs(scores[0] - scores[2]) > 1e-4


def test_saved_is_loaded(tmp_path):
    model = small_model(speakers=("anna", "ben"))
    model.centre.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PreferenceModel.from_pretrained(tmp_path)
    assert loaded.config == model.config and not any(weight.requires_grad for weight in loaded.parameters())
    features = random_features([20])
    assert loaded.score(features, TEXTS[:1]) == model.score(features, TEXTS[:1])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a preference model, it lacks config.json"):
        PreferenceModel.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_model().config | {"melody": "4st-10dB"}))
    with pytest.raises(InputError, match="got 4st-10dB, expected 2st-5dB.*Train it anew"):
        PreferenceModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_model().config | {"hidden_size": 8}))
    with pytest.raises(InputError, match="the preference model cannot be loaded"):
        PreferenceModel.from_pretrained(tmp_path)


def test_rewards_equal_the_formula_and_failures_earn_nothing(whisper, monkeypatch):
    """Silence, NaN, no codes and no END are failures; the words of a random Whisper are wrong, so the gate is open."""
    model = small_model(whisper=whisper.fingerprint())
    scorer = SpeechRolloutScorer(TOKENS, HummingCodec(), whisper, 2, preference_model=model)
    batch = [ids([20] * 30), ids([40] * 30), ids([]), ids([20] * 30, truncated=True), ids([63] * 9), ids([0] * 9)]
    passes, encode = [], WhisperScorer._encode
    monkeypatch.setattr(WhisperScorer, "_encode", lambda self, wavs: passes.append(len(wavs)) or encode(self, wavs))
    rewards = call(PreferenceReward(scorer, max_wer=100.0), batch)
    assert sum(passes) == 3  # the clips with sound, once each
    assert rewards[2:] == [0.0] * 4
    wavs = scorer.codec.decode([[20] * 30, [40] * 30])
    features = [
        with_pitch_features(item, pitch_track(wav)) for item, wav in zip(whisper.encode(wavs), wavs, strict=True)
    ]
    expected = [1 / (1 + np.exp(-score)) for score in model.score(features, ["hello"] * 2)]
    assert rewards[:2] == pytest.approx(expected, abs=1e-6) and rewards[0] != rewards[1]
    wrong = [score.wer for score in scorer.rollouts.scores[:2]]
    gated = call(PreferenceReward(scorer, max_wer=min(wrong) / 2), batch)
    assert min(wrong) > 0 and gated == [0.0] * 6


def test_another_whisper_is_refused(whisper):
    with pytest.raises(InputError, match="trained on another Whisper's features"):
        SpeechRolloutScorer(TOKENS, HummingCodec(), whisper, 2, preference_model=small_model())


def test_the_shipped_config(whisper):
    config = load_config("reward_models/preference.json")
    model = small_model(whisper=whisper.fingerprint())
    scorer = SpeechRolloutScorer(TOKENS, HummingCodec(), whisper, 2, preference_model=model)
    rewards, weights = build_rewards(config, scorer)
    assert [reward.__name__ for reward in rewards] == ["whisper", "preference"] and weights == [1.0, 0.5]
    with pytest.raises(InputError, match="max_wer: must be >= 0"):
        PreferenceReward(None, max_wer=-1)


def test_train_py_learns_with_it(tmp_path, caplog):
    """A step of GRPO on tiny/ with a model of tiny/whisper.pt; without --preference_model it is asked for."""
    torch.manual_seed(0)
    scorer = WhisperScorer("tiny/whisper.pt", device="cpu")
    small_model(width=scorer.model.dims.n_audio_state, whisper=scorer.fingerprint()).save_pretrained(tmp_path / "p")
    flags = "--config configs/tiny.yaml --max_steps 1 --per_device_train_batch_size 8 --num_generations 4 "
    flags += "--max_completion_length 60 --sample_steps 0 --save_strategy no "
    flags += "--reward_config reward_models/preference.json"
    flags = [*flags.split(), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main(train.parse_args(flags))
    assert "the reward preference needs --preference_model" in caplog.text
    train.main(train.parse_args([*flags, "--preference_model", str(tmp_path / "p")]))
    record = (tmp_path / "run/run.json").read_text()
    assert "preference_model" in record
