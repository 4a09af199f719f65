import gzip
import hashlib
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from from_yaml import from_yaml
from padst_exp.cache import cached_array
from padst_exp.data.bigram import Bigram
from padst_exp.data.corpora import END_OF_TEXT, gpt2_tokenizer
from padst_exp.data.task import IGNORED, LanguageModeling
from padst_exp.data.text import train_bpe
from padst_exp.data.tokens import TokenStream, TrainBlocks, ValidationBlocks
from padst_exp.errors import UserError

LINES = [
    line
    for number in range(60)
    for line in ("", f" = Title {number} = ", "", f" The {number} foxes jumped over a dog . ")
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bpe(tmp_path: Path) -> dict[str, str]:
    """The two files of a tiny tokenizer in GPT-2's format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    vocab, merges = tokenizer.model.save(str(tmp_path))
    return {"vocab": vocab, "merges": merges}


def local_text(folder: Path, suffix: str) -> str:
    """WikiText as its own archives have it: blank lines hold a space."""
    folder.mkdir()
    for split, lines in (("train", LINES), ("valid", LINES[:40]), ("test", LINES[40:60])):
        text = "".join(f"{line}\n" if line else " \n" for line in lines)
        (folder / f"wiki.{split}.{suffix}").write_text(text)
    return str(folder)


def local_parquet(folder: Path) -> str:
    """WikiText as the hub has it: blank lines are empty rows."""
    import datasets

    folder.mkdir()
    for split, lines in (("train", LINES), ("validation", LINES[:40]), ("test", LINES[40:60])):
        rows = [f"{line}\n" if line else "" for line in lines]
        path = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    return str(folder)


def expected_tokens(lines: list[str], bpe: dict[str, str]) -> list[int]:
    tokenizer = gpt2_tokenizer(**bpe)
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [token for line in lines if line for token in [*tokenizer.encode(f"{line}\n").ids, end]]


def all_tokens(stream: TokenStream) -> list[int]:
    return stream.windows([0], len(stream))[0].tolist()


def scored(task: LanguageModeling) -> list[int]:
    pairs = [task.validation[index][1] for index in range(len(task.validation))]
    return [token for targets in pairs for token in targets.tolist() if token != IGNORED]


@pytest.mark.parametrize("layout", ["raw", "tokens", "parquet"])
def test_wikitext_blocks_equal_plain_concatenation(
    tmp_path: Path, bpe: dict[str, str], layout: str
) -> None:
    folder = tmp_path / "wikitext"
    root = local_parquet(folder) if layout == "parquet" else local_text(folder, layout)
    task = from_yaml("dataset/wikitext103", root=root, context_length=16, **bpe)
    assert task.model_shape == {"vocab_size": 300, "context_length": 16}
    expected = expected_tokens(LINES, bpe)
    assert all_tokens(task.train.stream) == expected
    blocks = [task.train[(0, index)] for index in range(len(task.train))]
    inputs = torch.cat([inputs for inputs, _ in blocks])
    targets = torch.cat([targets for _, targets in blocks])
    assert inputs.tolist() == expected[: len(inputs)]
    assert targets.tolist() == expected[1 : len(inputs) + 1]
    assert len(expected) - 1 - len(inputs) < 16
    held_out = expected_tokens(LINES[:40], bpe)
    assert scored(task) == held_out[1:]
    words = sum(len(line.split()) + 1 for line in LINES[:40])
    assert task.words == words
    # As a pass over all blocks adds up: the first token has no loss, its word counts.
    summary = task.summarize({"nll": 2.0 * (len(held_out) - 1), "tokens": len(held_out) - 1})
    assert summary["word_perplexity"] == pytest.approx(np.exp(2 * (len(held_out) - 1) / words))
    # Blank lines are not tokens, and not the same bytes in every layout.
    assert task.bytes == sum(len(f"{line}\n".encode()) for line in LINES[:40] if line.strip())


def test_wikitext_split_selects_the_test_text(tmp_path: Path, bpe: dict[str, str]) -> None:
    root = local_text(tmp_path / "wikitext", "raw")
    task = from_yaml("dataset/wikitext103", root=root, split="test", context_length=16, **bpe)
    assert scored(task) == expected_tokens(LINES[40:60], bpe)[1:]


def test_tokenised_text_is_cached_by_content(
    tmp_path: Path, bpe: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = local_text(tmp_path / "wikitext", "raw")
    before = from_yaml("dataset/wikitext103", root=root, context_length=16, **bpe)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("datasets.Dataset._map_single", refuse)
    again = from_yaml("dataset/wikitext103", root=root, context_length=8, **bpe)
    assert all_tokens(again.train.stream) == all_tokens(before.train.stream)


def test_c4_reads_its_json_and_stops_where_told(tmp_path: Path, bpe: dict[str, str]) -> None:
    texts = [f"Document {number}.\nIt has two lines." for number in range(8)]
    (tmp_path / "en").mkdir()
    for split, rows in (("train", texts[:6]), ("validation", texts[6:])):
        with gzip.open(tmp_path / f"en/c4-{split}.00000-of-00001.json.gz", "wt") as file:
            for text in rows:
                file.write(json.dumps({"text": text, "url": "x", "timestamp": "y"}) + "\n")
    tokenizer = gpt2_tokenizer(**bpe)
    end = tokenizer.token_to_id(END_OF_TEXT)
    for documents in (None, 3):
        task = from_yaml(
            "dataset/c4", root=str(tmp_path), documents=documents, context_length=8, **bpe
        )
        kept = texts[: documents or 6]
        expected = [token for text in kept for token in [*tokenizer.encode(text).ids, end]]
        assert all_tokens(task.train.stream) == expected


def test_missing_corpora_name_their_keys(tmp_path: Path, bpe: dict[str, str]) -> None:
    cases = {
        rf"dataset\.root: expected .* train files .* got {tmp_path}$": {
            "root": str(tmp_path),
            **bpe,
        },
        r"dataset\.root: expected .*nowhere$": {"root": str(tmp_path / "nowhere"), **bpe},
        r"dataset\.merges: expected .*, got None$": {"vocab": bpe["vocab"]},
        r"dataset\.vocab: expected .*, got None$": {"merges": bpe["merges"]},
        r"dataset\.vocab: expected GPT-2's": {"vocab": bpe["merges"], "merges": bpe["vocab"]},
        r"dataset\.merges: expected .*, got gone$": {"vocab": bpe["vocab"], "merges": "gone"},
    }
    for message, keys in cases.items():
        with pytest.raises(UserError, match=message) as error:
            from_yaml("dataset/wikitext103", **keys)
        assert "\n" not in str(error.value)


def test_a_vocabulary_without_end_of_text_is_an_error(tmp_path: Path, bpe: dict[str, str]) -> None:
    vocab = json.loads(Path(bpe["vocab"]).read_text())
    del vocab[END_OF_TEXT]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"^dataset\.vocab: expected .*endoftext"):
        gpt2_tokenizer(str(path), bpe["merges"])


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unplugged:
        def head(self, url: str, timeout: float) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Unplugged)
    with pytest.raises(UserError, match=r"^dataset\.vocab: expected .*no route to host"):
        from_yaml("dataset/wikitext103")


def test_damaged_token_caches_are_made_again(cache: Path, tmp_path: Path) -> None:
    pieces = [np.arange(7, dtype=np.int32), np.arange(4, dtype=np.int32)]
    made = cached_array("tokens", lambda: pieces, below=7)
    path, expected = cache / "tokens", [*range(7), *range(4)]
    assert made.tolist() == expected
    assert cached_array("tokens", list, below=7).tolist() == expected  # so it does read the file
    stored = path.read_bytes()
    cached_array("of another vocabulary", lambda: [np.array([3, 9], np.int32)], below=10)
    foreign = (cache / "of another vocabulary").read_bytes()
    beyond = np.array([99], "<i4").tobytes() + stored[4:]
    signed = [
        numbers.tobytes() + hashlib.sha256(b"tokens\n" + numbers.tobytes()).digest()
        for numbers in (np.array([0, 7], "<i4"), np.array([3, -1], "<i4"))
    ]
    cut = b"", stored[:-1], stored[:-4], stored[4:], stored + b"xxxx"
    for damaged in (*cut, beyond, foreign, *signed):
        path.write_bytes(damaged)
        assert cached_array("tokens", lambda: pieces, below=7).tolist() == expected
        assert path.read_bytes() == stored
    path.unlink()
    path.mkdir()
    assert cached_array("tokens", lambda: pieces, below=7).tolist() == expected


def test_a_mapped_stream_is_sent_to_a_worker_by_name(tmp_path: Path, cache: Path) -> None:
    stream = TokenStream(
        cached_array("tokens", lambda: [np.arange(10_000, dtype=np.int32)], below=10_000)
    )
    sent = pickle.dumps(stream)
    assert len(sent) < 1000
    starts = [0, 2, 9_990]
    assert np.array_equal(pickle.loads(sent).windows(starts, 7), stream.windows(starts, 7))
    assert stream.windows([9_993], 7).tolist() == [list(range(9_993, 10_000))]
    assert stream.windows([0], 2).dtype == np.int64


def test_validation_scores_every_token_but_the_first_once() -> None:
    for length in range(9, 26):
        blocks = ValidationBlocks(TokenStream(np.arange(length)), 8)
        targets = [token for index in range(len(blocks)) for token in blocks[index][1].tolist()]
        assert [token for token in targets if token != IGNORED] == list(range(1, length))
        for index in range(len(blocks)):
            inputs, wanted = blocks[index]
            kept = wanted != IGNORED
            assert torch.equal(wanted[kept], inputs[kept] + 1)


def test_moving_blocks_follow_seed_and_epoch_and_stay_inside() -> None:
    blocks = TrainBlocks(TokenStream(np.arange(41)), 8, moving=True)
    assert len(blocks) == 4
    firsts = set()
    for epoch in range(60):
        inputs, targets = blocks.__getitems__([(epoch, index) for index in range(4)])
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[1:, 0], inputs[:-1, 0] + 8)
        firsts.add(inputs[0, 0].item())
    assert firsts == set(range(8))


def test_a_text_below_one_block_names_its_key() -> None:
    stream = TokenStream(np.arange(8))
    for build in (
        lambda: TrainBlocks(stream, 8, moving=False),
        lambda: ValidationBlocks(stream, 8),
    ):
        with pytest.raises(UserError, match=r"^dataset\.context_length: .* 8 tokens of .*, got 8$"):
            build()


def test_bigram_probabilities_sum_to_one_and_reward_what_was_seen() -> None:
    vocab_size = 23
    tokens = np.random.default_rng(0).geometric(0.2, 400).clip(0, vocab_size - 3)
    model = Bigram(tokens, vocab_size)
    previous, following = np.divmod(np.arange(vocab_size**2), vocab_size)
    table = model.probabilities(previous, following).reshape(vocab_size, vocab_size)
    np.testing.assert_allclose(table.sum(1), 1)  # the last two contexts were never seen
    assert table.min() > 0
    np.testing.assert_allclose(
        model.perplexity(tokens),
        np.exp(-np.mean([np.log(table[pair]) for pair in itertools.pairwise(tokens)])),
    )


def test_bigram_formula_on_a_text_counted_by_hand() -> None:
    # Pairs ab ab bc ca: n1 = 2, n2 = 1, so D = 1/2. Distinct predecessors: a 1, b 1, c 1.
    tokens = np.array([0, 1, 2, 0, 1])
    model = Bigram(tokens, 4)
    assert model.discount == 2 / (2 + 2 * 1)
    # All three continuation counts are 1: their own discount is 1, which leaves the uniform.
    assert model.continuation.tolist() == [0.25] * 4
    # p(b | a) = (2 - .5) / 2 + .5 * 1 / 2 * 1/4
    assert model.probabilities(np.array([0]), np.array([1]))[0] == pytest.approx(0.8125)


def test_bpe_is_deterministic_lossless_and_cached(cache: Path) -> None:
    text = "\n".join(LINES) + " \u00e9\u4e2d\t end"
    first = train_bpe(text, 290)
    (path,) = cache.iterdir()
    stored = path.read_bytes()
    path.unlink()
    assert train_bpe(text, 290).to_str() == first.to_str()
    assert path.read_bytes() == stored
    other = train_bpe(text, 280).to_str()
    digest = hashlib.sha256(f"{path.name}\n{other}".encode()).hexdigest()
    path.write_text(f"{digest}\n{other}")
    assert train_bpe(text, 290).get_vocab_size() == 280  # so it does read the file
    (of_another,) = {one for one in cache.iterdir() if one != path}
    text_of_none = hashlib.sha256(path.name.encode() + b"\n5").hexdigest().encode() + b"\n5"
    for damaged in (
        b"", stored[:-9], stored[9:], stored.replace(b"vocab", b"vokab"), b"\xff",
        of_another.read_bytes(), text_of_none,
    ):  # fmt: skip
        path.write_bytes(damaged)
        assert train_bpe(text, 290).to_str() == first.to_str()
        assert path.read_bytes() == stored
    assert first.decode(first.encode(text).ids) == text


def test_bpe_does_without_a_cache_it_cannot_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PADST_CACHE", str(blocked / "cache"))
    assert train_bpe("a b a b", 257).get_vocab_size() >= 256


def test_shakespeare_holds_out_a_play_and_has_a_bigram_baseline() -> None:
    task = from_yaml("dataset/shakespeare", vocab_size=512, context_length=64)
    validation = task.tokenizer.decode(task.validation_tokens.tolist())
    assert validation.startswith("AS YOU LIKE IT")
    assert "the wise man knows himself to\nbe a fool" in validation
    train = task.tokenizer.decode(task.train_tokens.tolist())
    assert "AS YOU LIKE IT" not in train
    assert "To be, or not to be" in train
    assert "utenberg" not in train + validation
    assert 0.07 < len(validation) / len(train + validation) < 0.1
    assert task.model_shape == {"vocab_size": 512, "context_length": 64}
    assert len(scored(task)) == len(task.validation_tokens) - 1
    # Between what is impossible for bigrams and what a unigram model gives.
    unigram = np.bincount(task.train_tokens, minlength=512) + 1
    nll = -np.log(unigram / unigram.sum())[task.validation_tokens].mean()
    assert 20 < task.baselines()["bigram_perplexity"] < 0.5 * np.exp(nll)


def test_the_play_before_the_last_can_be_held_out() -> None:
    task = from_yaml("dataset/shakespeare", split="held_out", vocab_size=260, context_length=64)
    held = task.tokenizer.decode(task.validation_tokens.tolist())
    train = task.tokenizer.decode(task.train_tokens.tolist())
    title = held.partition("\n")[0]
    assert title.isupper() and title not in train
    assert "the wise man knows himself to\nbe a fool" not in train + held


def test_text_file_splits_at_a_line_and_names_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(LINES))
    task = from_yaml(
        "dataset/text_file",
        path=str(path),
        vocab_size=300,
        context_length=8,
        validation_fraction=0.25,
    )
    parts = [
        task.tokenizer.decode(tokens.tolist())
        for tokens in (task.train_tokens, task.validation_tokens)
    ]
    assert "".join(parts) == "\n".join(LINES)
    assert parts[0].endswith("\n")
    assert len(parts[1]) / len("".join(parts)) == pytest.approx(0.25, abs=0.02)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases: dict[str, dict[str, object]] = {
        r"dataset\.path: expected .* got gone$": {"path": "gone"},
        r"dataset\.path: expected one file of plain text .* got \S+$": {"path": str(tmp_path)},
        r"dataset\.path: expected UTF-8 text, got .*binary\.txt": {"path": str(binary)},
        r"dataset\.path: expected UTF-8 text.*empty\.txt \(it is empty\)$": {"path": str(empty)},
        r"dataset\.vocab_size: .* got 10$": {"path": str(path), "vocab_size": 10},
        r"dataset\.context_length: .* got 0$": {"path": str(path), "context_length": 0},
        r"dataset\.validation_fraction: .* got 1\.0$": {
            "path": str(path),
            "validation_fraction": 1.0,
        },
    }
    for message, keys in cases.items():
        with pytest.raises(UserError, match=message) as error:
            from_yaml("dataset/text_file", **keys)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_text_without_line_breaks_or_packed_is_read(
    tmp_path: Path, cache: Path, bpe: dict[str, str]
) -> None:
    words = " ".join(LINES).split()
    texts = {
        "text8": " ".join(words).encode(),
        "one word": "".join(words).encode(),
        "lines.gz": gzip.compress("\n".join(LINES).encode()),
        "windows": "\r\n".join(LINES).encode(),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        task = from_yaml(
            "dataset/text_file", path=str(tmp_path / name), vocab_size=300, context_length=8
        )
        parts = [
            task.tokenizer.decode(tokens.tolist())
            for tokens in (task.train_tokens, task.validation_tokens)
        ]
        text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
        assert "".join(parts) == text.replace("\r\n", "\n")
        assert len(parts[1]) / len("".join(parts)) == pytest.approx(0.1, abs=0.03)
        assert name == "one word" or parts[0][-1].isspace()
    for suffix, pack in (("txt", bytes), ("txt.gz", gzip.compress)):
        folder = tmp_path / f"wiki {suffix}"
        folder.mkdir()
        for split in ("train", "valid"):
            (folder / f"{split}.{suffix}").write_bytes(pack(texts["text8"]))
        task = from_yaml("dataset/wikitext103", root=str(folder), context_length=8, **bpe)
        expected = gpt2_tokenizer(**bpe).encode(texts["text8"].decode()).ids
        assert all_tokens(task.train.stream)[:-1] == expected


def test_damaged_packed_text_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(LINES).encode())
    path = tmp_path / "a.txt.gz"
    for content in (b"", whole[:-9], whole[9:], gzip.compress(b""), gzip.compress(b"\xff")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^dataset\.path: expected UTF-8 text, got ") as error:
            from_yaml("dataset/text_file", path=str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_sizes_below_one_name_their_key(tmp_path: Path, bpe: dict[str, str]) -> None:
    root = local_text(tmp_path / "wikitext", "raw")
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(LINES))
    keys: dict[str, dict[str, object]] = {
        "wikitext103": {"root": root, **bpe},
        "c4": {"root": root, **bpe},
        "text_file": {"path": str(mine), "vocab_size": 300},
        "shakespeare": {},
        "synthetic_tokens": {},
    }
    for name, others in keys.items():
        for size in (0, -1):
            with pytest.raises(UserError, match=rf"^dataset\.context_length: .* got {size}$"):
                from_yaml(f"dataset/{name}", **others, context_length=size)


def test_a_whole_tokenizer_is_a_vocabulary(tmp_path: Path, bpe: dict[str, str]) -> None:
    parts = gpt2_tokenizer(**bpe)
    path = tmp_path / "tokenizer.json"
    parts.save(str(path))
    whole = gpt2_tokenizer(str(path), None)
    assert whole.encode(LINES[3]).ids == parts.encode(LINES[3]).ids
    with pytest.raises(UserError, match=r"^dataset\.merges: expected null beside a tokenizer"):
        gpt2_tokenizer(str(path), bpe["merges"])


def test_vocabularies_and_merges_that_do_not_fit_are_one_line(
    tmp_path: Path, bpe: dict[str, str]
) -> None:
    vocab = json.loads(Path(bpe["vocab"]).read_text())
    merges = Path(bpe["merges"]).read_text()
    lines = merges.splitlines(keepends=True)
    last = next(iter(vocab))
    vocabularies = (
        json.dumps({**vocab, last: len(vocab)}),
        json.dumps({**vocab, last: -1}),
        json.dumps({**vocab, last: "1"}),
        json.dumps({**vocab, last: True}),
        json.dumps({**vocab, last: None}),
        json.dumps(vocab)[:-20],
        "{}",
        "[]",
        "3",
        "",
        '{"model": {}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    )
    others = (
        "",
        lines[0],
        "".join(lines[:-1]),
        merges[:-3],
        merges + "x y z\n",
        merges + "qq zz\n",
    )
    path = tmp_path / "other"
    for key, contents in (("vocab", vocabularies), ("merges", others)):
        for content in contents:
            path.write_text(content)
            with pytest.raises(UserError, match=rf"^dataset\.{key}: expected ") as error:
                gpt2_tokenizer(**{**bpe, key: str(path)})
            line = str(error.value)
            assert str(path) in line
            assert line.isprintable()


def test_cells_without_text_name_file_and_row(tmp_path: Path, bpe: dict[str, str]) -> None:
    import datasets

    for number, cells in enumerate((["a"] * 1001 + [None], [1, 2])):
        root = tmp_path / str(number)
        root.mkdir()
        for split in ("train", "validation"):
            datasets.Dataset.from_dict({"text": cells}).to_parquet(root / f"{split}.parquet")
        row = 1001 if number == 0 else 0
        with pytest.raises(UserError, match=rf"expected text, got .* in row {row} of .*parquet$"):
            from_yaml("dataset/wikitext103", root=str(root), context_length=8, **bpe)
