"""All that may be a user's file is read in a block of one function, `padst_exp.files.reading`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import padst_exp

SOURCE = Path(padst_exp.__file__).parent
READERS = {
    "open", "read_text", "read_bytes", "read_csv", "read_parquet", "read_json", "safe_open",
    "load_file", "ParquetFile", "from_file", "ZipFile", "decompress", "memmap",
    "fromfile", "loadtxt", "genfromtxt", "load_dataset",
}  # fmt: skip
LOADERS = {"torch", "json", "yaml", "np", "numpy", "pickle", "OmegaConf", "joblib", "tomllib"}
OWN = {"RunDirectory": {"open"}}  # which opens no file
# What reads no user's file, or is called by who reads one, by module and function.
OTHERS = {
    "atomic": {"replacing", "own_descriptor", "sync"},  # write
    "files": {"sha256", "_no_content"},  # parts of the one function, and of its blocks
    "cli": {"_undecodable"},  # looks for the line of an error in conf/
    "config": {"option_node"},  # our own conf/
    "messages": {"outlive_readers", "_to_nowhere"},  # open nothing
    "processes": {"_place", "_started"},  # /proc
    "memory": {"total_memory"},  # of the control group
    "bench.session": {"last_level_cache"},  # /sys
    "dispatch.timing": {"device_name", "_kernels_digest", "_times"},  # /proc, our code, our cache
    "engine.checkpoint": {
        "_copy",
        "_prune",
    },  # of what was just written
    "engine.lock": {"_link", "_take_away", "read", "__init__"},  # whose content is never shown
    "engine.records": {"read_metrics"},  # rows of what was read
    "engine.run_directory": {"open_metrics"},  # writes
    "data.image_files": {"_cifar_bytes"},  # in a block of its only caller
    "data.corpora": {"_hub_tokenizer"},  # of the hub's cache
    "data.tokens": {"_remapped"},  # opens again what was found sound
    "data.sources": {
        "_load",
        "load_hub",
        "__str__",
        "_require_row",
    },  # of its caller; tells of a row
    "data.shards": {"__str__", "_checked", "_label"},  # tells of a member; in blocks of callers
    "data.imagenet_variants": {"_lines", "_relabelled"},  # timm's own lists
    "integrations.timm": {"timm_files"},  # what timm has just written
    "report.plan": {"_own_dim"},  # our own conf/
    "report.runs": {"_entry"},  # a line of what was read
    "report.store": {"_sweeper"},  # our own conf/
    "sweeps.local": {"_run", "_failure"},  # what our own processes say
    "sweeps.sweep": {"record"},  # writes
    "data.text": {"__init__"},  # our own asset
}


def reads(tree: ast.AST, function: str = "", inside: bool = False) -> Iterator[tuple[str, int]]:
    """Function and line of every call that reads a file, outside of the blocks of `reading`."""
    for node in ast.iter_child_nodes(tree):
        name, within = function, inside
        if isinstance(node, ast.FunctionDef):
            name = node.name
        if isinstance(node, ast.With):
            within |= any(called(item.context_expr) == "reading" for item in node.items)
        if isinstance(node, ast.Call) and not within and is_reader(node):
            yield name, node.lineno
        yield from reads(node, name, within)


def called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Name | ast.Attribute):
        return function.id if isinstance(function, ast.Name) else function.attr
    return ""


def is_reader(call: ast.Call) -> bool:
    function, name = call.func, called(call)
    if "config_dir" in ast.unparse(call):  # our own conf/
        return False
    if name == "read_text" and isinstance(function, ast.Name):
        return False  # that of padst_exp.files
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if owner == "":  # timm's function, no method of a module
        return name in {*READERS, "load_state_dict"}
    return name in READERS - OWN.get(owner, set()) or (owner in LOADERS and "load" in name)


def test_every_reader_is_in_the_one_function_s_block_or_named_here() -> None:
    found: dict[str, set[str]] = {}
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for function, line in reads(ast.parse(path.read_text("utf-8"))):
            found.setdefault(module, set()).add(function)
            if function not in OTHERS.get(module, ()):
                wrong.append(f"{path.relative_to(SOURCE)}, line {line}, in {function}")
    assert not wrong, "\n".join(wrong)
    # Nor is anything named that reads no longer.
    assert {module: names - found.get(module, set()) for module, names in OTHERS.items()} == {
        module: set() for module in OTHERS
    }


def test_a_reader_outside_of_a_block_is_seen() -> None:
    code = """
def sound(path):
    with reading("key", path, "a table"), other():
        return [pd.read_csv(path)]
def wrong(path):
    with other():
        return json.loads(path.read_text())
"""
    assert set(reads(ast.parse(code))) == {("wrong", 7)}
    for call in ("torch.load(f)", "open(f)", "Image.open(f)", "yaml.safe_load(f)", "np.load(f)"):
        assert list(reads(ast.parse(call))) == [("", 1)], call
