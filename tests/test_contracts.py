"""The contracts in hvdlm/protocols: their size, and that optimizer state has the names of the contract everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from builders import both_frameworks, small_trainable, token_batch
from hvdlm.config import TrainConfig
from hvdlm.protocols.state_dict import OPTIMIZER_STATE, optimizer_state
from launching import ROOT

MOST = 6  # methods
PROTOCOLS = sorted((ROOT / "hvdlm" / "protocols").glob("*.py"))


def protocols(source: str) -> dict[str, list[str]]:
    """Return the methods of every Protocol class that it defines itself, properties (attributes) left out."""
    classes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
            functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
            classes[node.name] = [
                f.name for f in functions if not any("property" in ast.unparse(d) for d in f.decorator_list)
            ]
    return classes


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_contract_has_six_methods_at_most(path: Path) -> None:
    for name, methods in protocols(path.read_text(encoding="utf-8")).items():
        assert len(methods) <= MOST, f"{path.name}: split {name}, which has {', '.join(methods)}"


def test_a_contract_with_seven_methods_is_noticed() -> None:
    methods = "\n".join(f"    def m{n}(self): ..." for n in range(7))
    assert len(protocols(f"class C(Protocol):\n    @property\n    def p(self): ...\n{methods}")["C"]) == 7


@both_frameworks
@pytest.mark.parametrize("optimizer", [*OPTIMIZER_STATE, "sgd without momentum"])
def test_optimizer_state_has_the_names_of_the_contract(framework: str, optimizer: str) -> None:
    name, momentum = optimizer.partition(" ")[0], 0.0 if "without" in optimizer else 0.9
    # Of a recurrent model, Muon has no matrices: it keeps a momentum of those that it has, and moments of the others.
    trainable = small_trainable(framework, "gpt" if name == "muon" else "rnn", optimizer=name, momentum=momentum)
    shown = {"momentum": "mlp.up.weight"} if name == "muon" else {}
    trainable.train_step([token_batch()], 1e-3, 0)
    kinds = {key.split("/")[1] for key in trainable.state() if key.startswith("optimizer/")}
    expected = optimizer_state(TrainConfig(optimizer=name, momentum=momentum))
    assert kinds == set(expected) and ("without" in optimizer) == (not expected)
    for kind in expected:
        parameter = shown.get(kind, "mlp.up.bias" if name == "muon" else "head.bias")
        arrays = [a for key, a in trainable.state().items() if f"optimizer/{kind}/" in key and parameter in key]
        assert arrays and all(np.abs(a).sum() > 0 for a in arrays)
