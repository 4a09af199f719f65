"""Packed language models in transformers itself: loaded, generating, saved again, damaged."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from from_yaml import asked
from hostile import trained_run
from inference.small_models import assert_equal
from inference.test_export import make_run
from padst_exp.dispatch import device_name
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.export import ExportSchema, export
from padst_exp.inference import PackedLinear, load
from padst_exp.inference.packing import harden
from padst_exp.integrations.transformers import pack_pretrained
from padst_exp.restore import restore, restore_run
from padst_exp.sparsify import Rule, sparsify
from permutation_cases import learned
from structure_cases import STRUCTURES

WORDS = "The quick brown fox jumps over a lazy dog and it barks at all of them.\n"
# A tiled structure and a companion; single entries, whose columns are uint16.
CASES = {"gpt2": ("nm", "model=gpt2", "low_rank=1"), "llama": ("unstructured", "model=llama_60m")}


def exported(run: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {"format": "transformers", "device": "cpu"}
    return export(asked("export", ExportSchema, run=str(run), **{**given, **changes}), World())[0]


def made(root: Path, case: str) -> Path:
    structure, *model = CASES[case]
    (root / "mine.txt").write_text(WORDS * 60)
    data = ["dataset=text_file", f"dataset.path={root / 'mine.txt'}", "dataset.vocab_size=280"]
    sizes = ["dataset.context_length=16", *(["model.mlp_dim=32"] if case == "llama" else [])]
    return trained_run(root, *model, f"structure={structure}", *data, *sizes)


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return exported(run)


def loaded(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def tokens() -> torch.Tensor:
    return torch.randint(200, (2, 11), generator=torch.Generator().manual_seed(0))


def test_it_computes_what_the_run_does_and_generates(run: Path, folder: Path) -> None:
    model, inputs = loaded(folder), tokens()
    trained = restore_run(run, World()).model.eval()
    harden(trained)
    with torch.no_grad():
        assert_equal(model(inputs).logits, trained(inputs), run)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    for ours in (restore(folder, World()).model, load(folder)):
        assert_equal(model(inputs).logits, ours(inputs), "our own loader")
    # Its cache of keys and values changes nothing.
    found = model.generate(inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = inputs
    for _ in range(4):
        with torch.no_grad():
            following = trained(expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], 1)
    assert torch.equal(found, expected)


def test_the_part_without_head_and_other_precisions_load(folder: Path) -> None:
    model, inputs = loaded(folder, dtype=torch.bfloat16), tokens()
    full = loaded(folder)
    assert model.dtype == torch.bfloat16
    assert_equal(model(inputs).logits.float(), full(inputs).logits, "bfloat16", 0.05)
    base = AutoModel.from_pretrained(folder)
    hidden = base(inputs).last_hidden_state
    assert_equal(full.lm_head(hidden), full(inputs).logits, "base")


def test_what_is_saved_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    first = loaded(folder)
    first.save_pretrained(tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_equal(loaded(tmp_path)(tokens()).logits, first(tokens()).logits, "whole")
    first.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    again = loaded(tmp_path / "parts")
    assert all(map(torch.equal, again.state_dict().values(), first.state_dict().values()))
    assert_equal(again(tokens()).logits, first(tokens()).logits, "parts")


def test_a_packed_model_is_fine_tuned_by_trainer(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = loaded(folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {n: m.matrix() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=2, learning_rate=0.02,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(model.requires_grad_(), arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    model.requires_grad_(False).eval()
    for name, matrix in before.items():
        after = model.get_submodule(name).matrix()
        assert not torch.equal(after, matrix) and torch.equal(after != 0, matrix != 0)
    assert_equal(loaded(tmp_path / "run/checkpoint-8")(tokens()).logits, model(tokens()).logits, "")


def test_plain_transformers_refuses_what_it_would_start_at_random(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(folder).save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "padst")
    for packed in (folder, tmp_path):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loaded(packed)


def test_plain_transformers_finds_all_it_wants_in_a_dense_export(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    dense = exported(run, format="dense", out=str(tmp_path / "dense"))
    model, tokenizer = loaded(dense), AutoTokenizer.from_pretrained(dense)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert_equal(model(tokens()).logits, loaded(folder)(tokens()).logits, "dense")
    assert model.config.architectures == [type(model).__name__]
    assert tokenizer.decode(tokenizer(WORDS)["input_ids"]) == WORDS
    assert "padst_exp.integrations" not in (dense / "README.md").read_text()
    modes = {path.stat().st_mode for path in dense.iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"


def test_a_model_that_transformers_itself_trained_is_saved_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=211, **sizes)).eval()
    with pytest.raises(UserError, match=r"^model: expected one after sparsify, got a dense one$"):
        pack_pretrained(model)
    rules = [Rule("transformer.h.*.mlp.c_*")]
    sparsify(model, rules, structure=STRUCTURES["unstructured"], density=0.2, learner=learned())
    harden(model)
    expected = model(tokens()).logits.detach()
    pack_pretrained(model)
    assert_equal(model(tokens()).logits, expected, "packed")
    model.save_pretrained(tmp_path)
    assert_equal(loaded(tmp_path)(tokens()).logits, expected, "loaded")


def test_card_and_tokens(run: Path, folder: Path) -> None:
    described = json.loads((folder / "model.json").read_text())
    card = (folder / "README.md").read_text()
    perplexity = described["metrics_of_checkpoint"]["perplexity"]
    for wanted in (
        f"| perplexity | {perplexity:.4g} |",
        f"| all layers | {described['density_of_layers']:.4g} |",
        f"| all model | {described['density_of_model']:.4g} |",
        "| permutation | ",
        "| dst | rigl |",
        "Speed was not measured",
    ):
        assert wanted in card
    assert "| structure | nm group=" in card or "| structure | unstructured |" in card
    own = restore_run(run, World()).task.tokenizer  # type: ignore[attr-defined]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(WORDS)["input_ids"] == own.encode(WORDS).ids
    assert theirs.decode(theirs(WORDS)["input_ids"]) == WORDS
    assert theirs.model_max_length == 16
    assert exported(run, overwrite=True) == folder


def test_a_card_stays_with_a_model_that_is_saved_or_pushed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(run, out=str(tmp_path / "out"))
    card, model = (folder / "README.md").read_text(), copy.deepcopy(loaded(folder))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    pushed: dict[str, str] = {}

    def upload(self: Any, repo_id: str, operations: Any, **unused: Any) -> Any:
        """What would go to the hub, which cannot be reached from everywhere."""
        pushed.update({each.path_in_repo: each.path_or_fileobj for each in operations})
        pushed["card"] = Path(pushed["README.md"]).read_text()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **unused: RepoUrl(f"hf.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", upload)
    monkeypatch.setattr(ModelCard, "load", lambda *unused, **more: ModelCard("an older one"))
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    model.push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "README.md"} <= pushed.keys()
    assert pushed["card"].startswith(card) and "Trained further since" in pushed["card"]


def test_a_card_says_how_fast_it_was_where(run: Path, tmp_path: Path) -> None:
    card = (exported(run, measure=True, out=str(tmp_path / "out")) / "README.md").read_text()
    found = re.search(
        r"^A forward pass of 1 x 16 took .* as fast as .*: float32, (.*)$", card, re.M
    )
    assert found and device_name(torch.device("cpu")) in found[1]
    with pytest.raises(UserError, match=r"^measure: expected true with format=transformers"):
        exported(run, measure=True, format="dense")


def changed_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.json").unlink()
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def changed_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def first(state: dict[str, Any], end: str) -> torch.Tensor:
    return next(tensor for name, tensor in state.items() if name.endswith(end))


def flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


NORMS = ("transformer.ln_f.weight", "model.norm.weight")


def toggle_bias(state: dict[str, Any]) -> None:
    """Lost where there was one, there where there was none."""
    layer = next(name for name in state if name.endswith(".parts.0.values"))
    bias = layer.replace("parts.0.values", "bias")
    if state.pop(bias, None) is None:
        state[bias] = torch.zeros(1)


DAMAGES = {
    "a bias": (changed_tensors(toggle_bias), "damaged at layer .*: (no|a) bias, unlike"),
    "a flipped byte": (flipped, "its digest is another one"),
    "beyond": (
        changed_tensors(lambda state: first(state, "columns").view(torch.int16).fill_(30000)),
        "damaged at layer .*: columns",
    ),
    "not finite": (
        changed_tensors(lambda state: first(state, "values").fill_(float("nan"))),
        "values is not finite",
    ),
    "a lost tensor": (
        changed_tensors(lambda state: state.pop(next(name for name in state if name in NORMS))),
        "does not fit its config.json: it has nothing for",
    ),
    "a foreign tensor": (
        changed_tensors(lambda state: state.update(more=torch.zeros(1))),
        "it has no place in its model for more",
    ),
    "another size": (
        changed_config(lambda config: config.update(vocab_size=7)),
        "does not fit its config.json: .* is torch.float32",
    ),
    "no layers": (
        changed_config(lambda config: config["quantization_config"].pop("layers")),
        r"^quantization_config\.layers: expected packed layers",
    ),
    "a layer of words": (
        changed_config(lambda config: config["quantization_config"]["layers"].update(a={"b": 1})),
        r"^quantization_config\.layers\.a\.in_features: expected",
    ),
    "a layer of nothing": (
        changed_config(lambda config: rename(config["quantization_config"]["layers"])),
        "damaged at layer nowhere",
    ),
    "another version": (
        changed_config(lambda config: config["quantization_config"].update(format=99)),
        r"^quantization_config\.format: expected 3, got 99",
    ),
}  # fmt: skip


def rename(layers: dict[str, Any]) -> None:
    layers["nowhere"] = layers.pop(next(iter(layers)))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    damage(damaged)
    with pytest.raises(UserError, match=message) as raised:
        loaded(damaged)
    assert "\n" not in str(raised.value)


def test_other_models_are_exported_otherwise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"^format: expected packed or dense for a model that is"):
        exported(run)
    assert not (run / "export-transformers").exists()
