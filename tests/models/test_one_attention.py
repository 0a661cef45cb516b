"""There is one attention in the library: `models.blockwise` has it, and everything else calls that."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import offbook

HOME = Path(offbook.__file__).parent
# Attention of other libraries, by the names that code must use to reach it.
MODULES = {"torch.nn.attention", "flash_attn", "xformers"}
NAMES = {
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "flex_attention",
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
}
PRODUCTS = {"baddbmm", "bmm", "einsum", "matmul", "mm"}
# Where another one is named nevertheless, and why.
ALLOWED = {
    ("learning/networks.py", "softmax times values"): "the mean place of a feature in a map: no queries, no keys",
    ("systems/agentic_transformer/lengths.py", "torch.nn.attention"): "picks plain attention, to measure ours with",
    ("systems/bpt/measure.py", "torch.nn.attention"): "picks PyTorch's kernels for the arms that ours is measured with",
}


def found(source: str) -> Iterator[str]:
    """What in the source is attention: a name of it, or a product with what a softmax gave."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [alias.name for alias in node.names]
            for name in (module, *names, *(f"{module}.{name}" for name in names)):
                if any(name == taken or str(name).startswith(f"{taken}.") for taken in MODULES):
                    yield next(taken for taken in MODULES if str(name).startswith(taken))
            yield from NAMES & {name for name in names if str(module).startswith("torch")}
        elif isinstance(node, ast.Attribute) and (node.attr in NAMES or node.attr.startswith("_scaled_dot_product")):
            yield node.attr
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = (*functions, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
    outside = ast.Module([node for node in tree.body if node not in inner], type_ignores=[])
    for scope in (outside, *functions):
        if _weighs(scope):
            yield "softmax times values"


def _weighs(scope: ast.AST) -> bool:
    """Whether it multiplies matrices by what came from a softmax, under whatever name."""
    weights: set[str] = set()

    def weighted(node: ast.AST) -> bool:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in weights:
                return True
            if isinstance(inner, ast.Call) and _called(inner) in ("softmax", "Softmax"):
                return True
        return False

    nodes = list(ast.walk(scope))
    before = -1
    while len(weights) > before:
        before = len(weights)
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value and weighted(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                weights |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return any(
        (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and weighted(node))
        or (isinstance(node, ast.Call) and _called(node) in PRODUCTS and weighted(node))
        for node in nodes
    )


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("from torch.nn.functional import scaled_dot_product_attention", "scaled_dot_product_attention"),
        ("y = functional.scaled_dot_product_attention(q, k, v)", "scaled_dot_product_attention"),
        ("out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)", "_scaled_dot_product_flash_attention"),
        ("self.attention = nn.MultiheadAttention(8, 2)", "MultiheadAttention"),
        ("from torch.nn import TransformerEncoder as Body", "TransformerEncoder"),
        ("from torch.nn.attention.flex_attention import flex_attention", "torch.nn.attention"),
        ("from torch.nn import attention", "torch.nn.attention"),
        ("import torch.nn.attention as attention", "torch.nn.attention"),
        ("from flash_attn import flash_attn_func", "flash_attn"),
        ("o = (q @ k.mT).softmax(-1) @ v", "softmax times values"),
        ("def f(q, k, v):\n w = functional.softmax(q @ k.mT, -1)\n p = drop(w)\n return torch.bmm(p, v)",
         "softmax times values"),
        ("def f(q, k, v):\n a: Tensor = torch.softmax(q, -1)\n return torch.einsum('qk,ke->qe', a, v)",
         "softmax times values"),
    ],
)  # fmt: skip
def test_attention_is_found_however_it_is_written(source: str, what: str) -> None:
    assert what in list(found(source))


def test_what_is_no_attention_is_left_alone() -> None:
    lines = ["w = maps.softmax(2)", "x = (w * grid).sum(2)", "y = maps @ weight", "def f(w): return w @ y"]
    assert not list(found("\n".join([*lines, "class Transformer: pass"])))


def test_there_is_no_second_attention() -> None:
    files = [path for path in HOME.rglob("*.py") if HOME / "models/blockwise" not in path.parents]
    assert len(files) > 50
    everywhere = {
        (path.relative_to(HOME).as_posix(), what) for path in files for what in found(path.read_text("utf-8"))
    }
    assert everywhere == set(ALLOWED)
