"""Rule-based ASR rewards: formulas by hand, what is a hallucination and what is not, the call as TRL makes it."""

import json
import math
from pathlib import Path

import pytest
from fake_rollouts import call, transcript_scorer

from common.cli import InputError
from reward_models import build_rewards, load_config
from reward_models.asr_rules import (
    RULES,
    AsrRulesReward,
    accuracy_reward,
    back_to_back,
    find_keywords,
    hallucination,
    keyword_index,
    keyword_reward,
    no_overlap,
    other_script,
    repetition,
    transcript_errors,
    wrong_length,
)

REF = "The boat was already gone when we came to the harbour of Split."  # 13 words
REF_ZH = "今天天气很好我们去公园散步吧"  # 14 characters
REF_DE = "Der Zug nach Hamburg fährt heute von Gleis sieben ab."  # 10 words

# --- R1 ---


@pytest.mark.parametrize(
    ("ref", "hyp", "language", "expected"),
    [
        ("the boat was gone", "the boat is gone", "en", 0.75),  # 1 - 1 / 4
        ("The boat was gone.", "the boat was gone", "en", 1.0),  # Whisper's normaliser: case, punctuation …
        ("It's 20 dollars", "it is twenty dollars", "en", 1.0),  # … contractions and numbers
        ("the boat", "", "en", 0.0),
        ("the boat", "a goat in a moat", "en", 0.0),  # 2 substitutions + 3 insertions: 1 - 5 / 2 = -1.5, cut at 0
        (REF_DE, "Der Zug nach Homburg fährt heute von Kleis sieben ab", "de", 0.8),  # 1 - 2 / 10
        (REF_ZH, "今天天汽很好我们去公园散步", "zh", 12 / 14),  # one substituted, one deleted of 14 characters
        (REF_ZH, "今天 天气 很好, 我们 去 公园 散步 吧。", "zh", 1.0),  # spaces and punctuation do not count
    ],
)
def test_accuracy_by_hand(ref, hyp, language, expected):
    assert accuracy_reward(transcript_errors(ref, hyp, language)) == pytest.approx(expected)


def test_a_text_that_cannot_be_scored_raises():
    with pytest.raises(InputError, match="empty after Whisper's normalisation"):
        transcript_errors("...", "hello", "en")
    with pytest.raises(InputError, match="unknown language 'xx'"):
        transcript_errors("hello", "hello", "xx")


# --- R2 ---


def broken_rule(ref: str, hyp: str, language: str) -> str | None:
    return hallucination(ref, hyp, language, transcript_errors(ref, hyp, language))


@pytest.mark.parametrize(
    ("ref", "hyp", "language", "rule"),
    [
        (REF, "", "en", "empty"),
        (REF, " ... ", "en", "empty"),
        ("yes", "", "en", "empty"),
        # Loops: at the end, from the start, as long as the reference, of a whole sentence, of number words
        (REF, "The boat was already gone when we came to the to the to the to the to the", "en", "repetition"),
        (REF, "the the the the the the the the the the the the the", "en", "repetition"),
        (REF, REF + " of Split. of Split. of Split.", "en", "repetition"),
        (REF, "Thank you for watching. Thank you for watching. Thank you for watching.", "en", "repetition"),
        (REF, "Twenty twenty twenty twenty twenty twenty twenty twenty", "en", "repetition"),
        (REF, "The boat was hahahahahahahahaha", "en", "repetition"),
        (REF_DE, "Der Zug nach Hamburg, nach Hamburg, nach Hamburg, nach Hamburg, nach Hamburg", "de", "repetition"),
        (REF_ZH, "今天天气很好很好很好很好很好很好", "zh", "repetition"),
        (REF_ZH, "谢谢大家谢谢大家谢谢大家谢谢大家", "zh", "repetition"),
        # Twice as long, or less than half
        (REF, REF + " " + REF, "en", "length"),
        (REF, REF + " And then she told him about the winter that they had all spent in Lisbon.", "en", "length"),
        ("Thank you.", "Thank you so much for watching and see you in the next video", "en", "length"),
        (REF, "The boat was already", "en", "length"),
        (REF_ZH, REF_ZH + REF_ZH, "zh", "length"),
        (REF_ZH, "今天天气", "zh", "length"),
        # Translated
        (REF, "Лодка уже ушла, когда мы пришли в гавань", "en", "script"),
        (REF, "我们到的时候船已经走了", "en", "script"),
        ("thank you", "спасибо", "en", "script"),
        (REF_ZH, "The weather is nice today, let us walk in the park", "zh", "script"),
        ("Лодка уже ушла", "The boat had already left", "ru", "script"),
        (REF_DE, "The train to Hamburg leaves from platform seven today", "de", "no_overlap"),
        # Of another film
        (REF, "Nobody expected such beautiful weather for his sister's birthday party", "en", "no_overlap"),
        (REF_ZH, "请不吝点赞订阅转发打赏支持", "zh", "no_overlap"),
    ],
)  # fmt: skip
def test_hallucinations(ref, hyp, language, rule):
    assert broken_rule(ref, hyp, language) == rule


@pytest.mark.parametrize(
    ("ref", "hyp", "language"),
    [
        (REF, "The boat was already gone when we came to the harbour of spit.", "en"),
        (REF, "the goat was all ready gone when he came to the harbour of Split", "en"),
        (REF, "The boat was already gone we came the harbour of Split", "en"),
        (REF, "The the boat was was already gone when we we came to the harbour of Split", "en"),
        (REF, "A bought was already gun when wee camp two the harbour of spit", "en"),  # 8 of 13 wrong
        ("Anna found two boxes", "Hannah bound to foxes", "en"),  # every word wrong, all of them misheard
        ("yes", "no", "en"),
        ("yes", "yes it is so", "en"),
        ("hello", "hello there Sam Brown", "en"),
        ("good morning", "morning", "en"),
        ("what a day", "day", "en"),
        ("no no no no", "no no no no no", "en"),
        ("five five five one two", "five five five won to", "en"),  # "55512", and three words
        ("call five five five one two three four", "call 555-1234", "en"),
        ("I paid a million", "I paid ten million", "en"),  # 1000000 and 10000000
        ("it was very good", "it was very very very very good", "en"),  # 3 insertions
        ("I met Ivan yesterday", "I met Иван yesterday", "en"),
        (REF_DE, "Der Zug nach Homburg fährt heute von Kleis sieben", "de"),
        ("Die Donaudampfschifffahrt", "die Donau Dampf Schifffahrt", "de"),
        (REF_ZH, "今天天汽很好我门去公园散布吧", "zh"),  # three homophones
        (REF_ZH, "今天天气很好,我们去公园散步", "zh"),
        ("对", "对对对对对对", "zh"),
        ("我买了一部手机", "我买了一部 iPhone", "zh"),
        ("二零二四年", "2024年", "zh"),
        ("コンピュータを使います", "こんぴゅーたをつかいます", "ja"),  # one language, three scripts
        ("나는 학교에 갑니다", "나는 학교에 감니다", "ko"),
        ("2024", "две тысячи двадцать четыре", "ru"),  # no letter to compare with
    ],
)
def test_ordinary_misrecognitions(ref, hyp, language):
    assert broken_rule(ref, hyp, language) is None
    assert broken_rule(ref, ref, language) is None


def test_up_to_three_wrong_words_are_never_a_hallucination():
    """Every deletion, insertion and substitution of three words, next to each other, in texts of 4 to 13 words."""
    words = REF.rstrip(".").split()
    for length in range(4, len(words) + 1):
        ref = words[:length]
        for start in range(length - 2):
            left, right = ref[:start], ref[start + 3 :]
            for middle in ([], ["the"] * 3, ref[start : start + 3] + ["the"] * 3):
                assert broken_rule(" ".join(ref), " ".join(left + middle + right), "en") is None


def test_repeats_by_hand():
    assert back_to_back("a b a b a c".split(), 2) == 2  # a b a b a: 5 // 2
    assert back_to_back("a b a b a c".split(), 1) == 1
    assert back_to_back("x a a a a y".split(), 1) == 4
    assert back_to_back("x a a a a y".split(), 2) == 2
    assert back_to_back("a b c a b c a b c".split(), 3) == 3
    assert back_to_back([], 1) == back_to_back(["a"], 4) == 1


def test_repetition_counts_beyond_the_reference():
    assert not repetition("never", "never " * 4, "en")
    assert repetition("never", "never " * 5, "en")
    assert not repetition("no no no", "no " * 6, "en")  # 6 - 3 < 5 - 1
    assert repetition("no no no", "no " * 7, "en")
    assert not repetition("come on", "come on " * 3, "en")
    assert repetition("come on", "come on " * 4, "en")
    assert not repetition("a b c", "a b c " * 2, "en")
    assert repetition("a b c", "a b c " * 3, "en")
    assert not repetition("很", "很" * 4, "zh")  # a character is not more than a word
    assert repetition("很", "很" * 5, "zh")
    assert not repetition("ten million", "10000000", "en")
    assert not repetition("hahahahahaha", "hahahahahahaha", "en")
    assert repetition("ha", "hahahahahaha", "en")


def test_length_by_hand():
    # 5 words of 1 character: 10 is twice and 5 too many; 9 is not twice; 2 is under half but only 3 are missing
    assert wrong_length("a b c d e", "a b c d e f g h i j", "de")
    assert not wrong_length("a b c d e", "a b c d e f g h i", "de")
    assert not wrong_length("a b c d e", "a b", "de")
    assert wrong_length("a b c d e", "a", "de")
    assert not wrong_length("a b c d e f g h", "a b c d", "de")  # exactly half
    assert wrong_length("a b c d e f g h i", "a b c d", "de")  # 4 / 9
    assert not wrong_length("a", "a b c d", "de")  # four times as long, by three words
    assert wrong_length("a", "a b c d e", "de")
    assert not wrong_length("天气", "天气天气天气天气", "zh")  # 6 characters too many: three words
    assert wrong_length("天气", "天气天气天气天气天", "zh")


def test_script_and_overlap_by_hand():
    assert other_script("abcd", "абвг", "en")
    assert not other_script("ab", "ab аб", "en")  # 1 of 2 is not more than half
    assert other_script("ab", "ab аб в", "en")
    assert not other_script("我", "我我 ab", "zh")  # 2 characters are a word
    assert other_script("我", "我 ab", "zh")  # 1 of 1.5
    assert not other_script("abcd", "1234", "en")
    assert not no_overlap("a b c d e", "v w x y z", "de")  # 5 words may all be misheard
    assert no_overlap("a b c d e f", "u v w x y z", "de")
    assert not no_overlap("a b c d e f", "a v w x y z", "de")  # 1 of 6
    assert no_overlap("a b c d e f g h i j", "a v w x y z", "de")  # 1 of 10


# --- R3 ---


@pytest.mark.parametrize(
    ("ref", "hyp", "keywords", "language", "expected"),
    [
        ("from Zagreb to Split", "from Zagreb to Split", ["Zagreb", "Split"], "en", 1.0),
        ("from Zagreb to Split", "from zagreb to spit", ["Zagreb", "Split"], "en", 0.75),  # (1/2 + 1/1) / 2
        ("from Zagreb to Split", "Zagreb Zagreb to spit", ["Zagreb", "Split"], "en", 0.5),  # (1/2 + 1/2) / 2
        ("Zagreb Zagreb", "Zagreb", ["Zagreb"], "en", 0.75),  # a multiset: (1/2 + 1/1) / 2
        ("from Zagreb", "from the grab", ["Zagreb"], "en", 0.0),
        ("from here", "from Zagreb", ["Zagreb"], "en", 0.0),  # hallucinated
        ("from here", "from there", ["Zagreb"], "en", 1.0),
        ("in New York City", "in new york bay", ["New York City", "York"], "en", 0.75),  # recall 1/2, precision 1/1
        ("in New York now", "in New York now", ["New York", "York", "new york"], "en", 1.0),  # overlapping, and twice
        ("a splitting", "a splitting", ["Split"], "en", 1.0),  # whole words: neither has it
        ("Dr. Smith", "doctor smith", ["Dr. Smith", "..."], "en", 1.0),
        ("我住在上海市", "我住在商海市", ["上海", "我"], "zh", 0.75),  # recall 1/2, precision 1/1
        ("ich fahre nach Köln", "ich fahre nach köln", ["Köln"], "de", 1.0),
        ("ich fahre nach Köln", "ich fahre nach koeln", ["Köln"], "de", 0.0),
    ],
)
def test_keywords_by_hand(ref, hyp, keywords, language, expected):
    assert keyword_reward(ref, hyp, keywords, language) == pytest.approx(expected)


def test_find_keywords_counts_words():
    index = keyword_index(["New York", "York", "new  york!", "..."], "en")
    assert index == {("new", "york"): "New York", ("york",): "York"}
    assert find_keywords("New York, York; newyork", index, "en") == {"New York": 1, "York": 2}


# --- As TRL calls it ---


@pytest.fixture
def scorer():
    return transcript_scorer()


def test_a_group_through_the_class(scorer):
    ids = scorer.tokenizer.ids
    ref = "the boat was gone"
    batch = [
        ids("The boat was gone."),
        ids("the goat is gone"),
        ids(""),
        ids("the boat the boat the boat the boat"),
        ids("the boat was gone", truncated=True),
        ids("лодка ушла"),
    ]
    metrics = {}
    rewards = call(AsrRulesReward(scorer), batch, metrics, text=[ref] * 6)
    assert rewards == [1.0, 0.5, -1.0, -1.0, -1.0, -1.0]
    # edits: 0, 2 S, 4 D, 2 S + 4 I, 0, 2 S + 2 D; 6 * 4 = 24 reference words
    assert metrics["substitutions"] == pytest.approx(6 / 24)
    assert metrics["deletions"] == pytest.approx(6 / 24)
    assert metrics["insertions"] == pytest.approx(4 / 24)
    assert metrics["wer"] == pytest.approx(16 / 24)
    assert metrics["frac_exact"] == pytest.approx(2 / 6)
    assert metrics["frac_hallucination"] == pytest.approx(4 / 6)
    fractions = {rule: metrics[f"frac_{rule}"] for rule in RULES}
    broken = ("truncated", "empty", "script", "repetition")
    assert fractions == pytest.approx({rule: 1 / 6 if rule in broken else 0 for rule in RULES})
    assert "r_keywords" not in metrics
    assert scorer.transcripts.rules == [None, None, "empty", "repetition", "truncated", "script"]
    assert scorer.transcripts.hyp_texts[4] == "the boat was gone"

    # Without R2 each earns R1 of its transcript: 1 - 0, 1 - 2/4, 0, 1 - 6/4 cut at 0, 1, 1 - 4/4
    plain = AsrRulesReward(scorer, weight_hallucination=0)
    assert call(plain, batch, text=[ref] * 6) == [1.0, 0.5, 0.0, 0.0, 1.0, 0.0]
    assert call(AsrRulesReward(scorer, weight_hallucination=0.5), batch, text=[ref] * 6)[2:] == [-0.5] * 4


def test_clips_without_speech(scorer):
    """An empty transcript earns the full reward, words are hallucinations."""
    assert broken_rule("", "", "en") is None and broken_rule("", "...", "en") is None
    assert broken_rule("", "thank you", "en") == "non_speech"
    silent, spoken = transcript_errors("", "", "en"), transcript_errors("", "thank you", "en")
    assert accuracy_reward(silent) == 1.0 and accuracy_reward(spoken) == 0.0
    assert silent.edits == 0 and spoken.edits == 2
    metrics, ids = {}, scorer.tokenizer.ids
    batch, texts = [ids(""), ids("thank you"), ids("good morning")], ["", "", "good morning"]
    keywords = [["Zagreb"], [], []]
    assert call(AsrRulesReward(scorer), batch, metrics, text=texts, keywords=keywords) == [1.0, -1.0, 1.0]
    # The two hallucinated words are insertions, over the two reference words.
    assert metrics["wer"] == metrics["insertions"] == 1.0 and metrics["frac_non_speech"] == pytest.approx(1 / 3)
    scorer.score([ids("")], [""], None, lambda name, value: metrics.update({name: value}))
    assert math.isnan(metrics["wer"]) and metrics["frac_hallucination"] == 0.0


def test_languages_and_keywords_per_row(scorer):
    ids = scorer.tokenizer.ids
    texts = [REF_ZH, REF_DE, "from Zagreb to Split", "from Zagreb to Split", "good morning"]
    batch = [
        ids("今天天汽很好我们去公园散步"),
        ids("Der Zug nach Homburg fährt heute von Kleis sieben ab"),
        ids("from Zagreb to spit"),
        ids("from the grab to Split"),
        ids("good morning"),
    ]
    columns = {
        "language": ["zh", "de", "en", "en", "en"],
        "keywords": [None, ["Hamburg"], ["Zagreb", "Split"], ["Zagreb", "Split"], []],
    }
    metrics = {}
    rewards = call(AsrRulesReward(scorer), batch, metrics, text=texts, **columns)
    # without keywords R1 alone; else (R1 + R3) / 2: (0.8 + 0) / 2, (3/4 + 3/4) / 2,
    # (1 - 2/4 + 3/4) / 2 ("Zagreb" as "the grab": 1 S, 1 I)
    assert rewards == pytest.approx([12 / 14, 0.4, 0.75, 0.625, 1.0])
    assert metrics["r_keywords"] == pytest.approx((0 + 0.75 + 0.75) / 3)
    # (2 * R1 + 1 * R3 + 1 * exact) / 4, or / 3 without keywords
    weighted = AsrRulesReward(scorer, weight_accuracy=2.0, weight_exact=1.0)
    expected = [2 * 12 / 14 / 3, 1.6 / 4, (1.5 + 0.75) / 4, (1.0 + 0.75) / 4, 1.0]
    assert call(weighted, batch, text=texts, **columns) == pytest.approx(expected)
    exact = AsrRulesReward(scorer, weight_accuracy=0, weight_keywords=0, weight_exact=1)
    assert call(exact, batch, text=texts, **columns) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_called_alone(scorer):
    """Without TRL: completions and texts are all it needs."""
    batch = [scorer.tokenizer.ids("the goat was gone"), scorer.tokenizer.ids("from Zagreb")]
    assert AsrRulesReward(scorer)(batch, ["the boat was gone", "from Zagreb"]) == [0.75, 1.0]
    columns = {"language": ["en", "en"], "keywords": [None, ["Zagreb"]]}
    assert AsrRulesReward(scorer)(list(batch), ["the boat was gone", "from Zagreb"], **columns) == [0.75, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight_accuracy": -1}, r"weight_accuracy: must be finite and >= 0 \(got -1\)"),
        ({"weight_hallucination": float("nan")}, "weight_hallucination: must be finite"),
        ({"weight_keywords": float("inf")}, "weight_keywords: must be finite"),
        ({"weight_accuracy": 0}, "texts without keywords would have no reward"),
    ],
)
def test_bad_weights(scorer, weights, message):
    with pytest.raises(InputError, match=message):
        AsrRulesReward(scorer, **weights)


def test_keywords_must_be_lists(scorer):
    batch = [scorer.tokenizer.ids("good morning")]
    with pytest.raises(InputError, match=r"expected a list of words per row \(got 'good'\)"):
        call(AsrRulesReward(scorer), batch, text=["good morning"], keywords=["good"])


@pytest.mark.parametrize(
    ("name", "weights"),
    [("asr_wer", (1, 0, 0, 0)), ("asr_wer_hallucination", (1, 1, 0, 0)), ("asr_rules", (1, 1, 1, 0))],
)
def test_shipped_configs(scorer, name, weights):
    path = Path("reward_models") / f"{name}.json"
    [reward], [weight] = build_rewards(load_config(path, "asr"), scorer, "asr")
    assert weight == 1.0 and list(json.loads(path.read_text())) == ["asr_rules"] == [reward.__name__]
    assert tuple(reward.weights[term] for term in ("accuracy", "hallucination", "keywords", "exact")) == weights
