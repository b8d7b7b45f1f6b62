"""The two framework plugins have the same files, with the same public names in the same order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH, TENSORFLOW = ROOT / "plugins" / "hvdlm_torch", ROOT / "plugins" / "hvdlm_tensorflow"

# Files without a twin, with the reason.
SINGLE = {
    "activation_offload.py": "TensorFlow's graphs have no hooks for what they keep",
    "saved_tensors.py": "what TensorFlow keeps follows from the edges of a graph",
    "dropout.py": "PyTorch draws masks from a generator's state; TensorFlow from a seed that is an argument",
    "compiler.py": "torch.compile calls a compiler of the machine; TensorFlow's (XLA) is part of it",
    "kernels.py": "PyTorch multiplies float32 matrices slowly on AMD's processors; TensorFlow doesn't",
    "operations.py": "torch.compile sees the collectives of tensor ranks; XLA compiles no collective",
    "figures.py": "PyTorch only enqueues a step on a GPU; TensorFlow's graph of a step returns its figures",
    "counted_graph.py": "Python calls a TensorFlow graph's collectives only while the graph is traced",
    "ordering.py": "PyTorch's backward pass computes a layer's gradients before those of the layer below anyway",
    "shapes.py": "in PyTorch, sizes are integers",
    "slices.py": "PyTorch writes into a part of a tensor by copy_; TensorFlow's own way copies the whole from then on",
}
# Public names that one room lacks, with the reason.
DIFFERENT = {
    "devices.py:provide_threads": "PyTorch computes in the thread of the rank; TensorFlow in a pool of the process",
    "devices.py:to_device": "TensorFlow takes arrays as arguments of its graphs",
    "gradients.py:WholeGradients.before_backward": "PyTorch starts buckets by hooks; the edges of a graph do the same",
    "gradients.py:ScatteredGradients.before_backward": "as above",
    "gradients.py:Gradients.add": "PyTorch's backward pass adds to .grad; a graph returns gradients, to be added",
    "gradients.py:WholeGradients.add": "as above",
    "gradients.py:ScatteredGradients.add": "as above",
    "gradients.py:Gradients.pack": "in PyTorch, .grad is a view of the bucket",
    "gradients.py:Gradients.buckets": "in PyTorch, .grad is a view of the bucket",
    "gradients.py:WholeGradients.buckets": "as above",
    "gradients.py:ScatteredGradients.buckets": "as above",
    "gradients.py:TreeGradients.buckets": "as above",
    "gradients.py:LayerGradients.add": "as above",
    "gradients.py:LayerGradients.pack": "a graph's custom gradients have scattered them",
    "gradients.py:LayerGradients.begin": "the graph of the step before has kept the vector's memory",
    "gradients.py:LayerGradients.take": "a graph adds to a variable's memory when it alone has it",
    "gathered_layers.py:WholeLayers.enter": "PyTorch's layers begin and end by functions of autograd",
    "gathered_layers.py:WholeLayers.leave": "as above",
    "gathered_layers.py:GatheredLayers.enter": "as above",
    "gathered_layers.py:GatheredLayers.leave": "as above",
    "gathered_layers.py:GatheredLayers.free": "a graph frees what no later operation reads",
    "gathered_layers.py:GatheredLayers.release": "as above",
    "gathered_layers.py:WholeLayers.share": "PyTorch's activations may wait on the host, but for what layers share",
    "gathered_layers.py:WholeLayers.gather": "in a graph, gathered parameters are other tensors",
    "gathered_layers.py:WholeLayers.run": "a graph's layer is a function with a custom gradient",
    "gathered_layers.py:GatheredLayers.run": "as above",
    "gathered_layers.py:GatheredLayers.bytes": "the edges of a graph bound its memory; PyTorch's is counted",
    "gathered_layers.py:GatheredLayers.bound": "each graph begins to gather anew",
    "gathered_layers.py:GatheredLayers.gradients": "a graph's custom gradients have scattered them",
    "gathered_layers.py:GatheredLayers.add": "they stand in for Adapters, which each graph asks for its weights",
    "gathered_layers.py:GatheredLayers.frozen_arrays": "as above",
    "collectives.py:GatheredMatrix": "PyTorch's autograd keeps views of a buffer, which is filled again",
    "collectives.py:GatheredMatrix.product": "as above",
    "collectives.py:linear": "PyTorch's products are in kernels.py, which chooses between libraries",
    "optimizers.py:interpolated": "PyTorch has it: torch.lerp",
    "muon.py:Muon.prepare": "a branch of a graph, which an update is in, can't contain collectives",
    "memory.py:ActivationMemory.backward": "a graph's memory is counted from its trace, after the backward pass",
    "memory.py:ActivationMemory.bytes": "an attribute in TensorFlow; PyTorch counts what comes and goes",
    "memory.py:ActivationMemory.trace": "a pipeline stage's passes are two graphs; its memory is that of one",
    "adapters.py:Adapters.bound": "an attribute in PyTorch; in a graph, weights are read anew in every trace",
    "adapters.py:Adapters.gradients": "PyTorch derives the adapters' gradients in a hook of the backward pass",
    "attention.py:chunk_count": "PyTorch has scaled_dot_product_attention, whose kernels need no chunks",
    "attention.py:attend_to_gathered": "PyTorch passes keys and values of context ranks round a ring",
    "attention.py:document_masks": "TensorFlow makes the masks of documents chunk by chunk",
    "models/gpt.py:Cache.begin": "PyTorch's cache is overwritten in place; a graph returns a new one",
    "models/gpt.py:Cache.end": "as above",
    "models/gpt.py:Cache.joined": "as above",
    "forward.py:Forward.autocast": "TensorFlow's products are computed in the precision of weights that a graph rounds",
    "forward.py:Forward.rounded": "as above",
}


def files(room: Path) -> set[str]:
    return {str(path.relative_to(room)) for path in room.rglob("*.py")}


def public_names(path: Path) -> list[str]:
    """Return the public functions and classes of a file, and the public methods of the classes, in their order."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        names.append(node.name)
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                names.append(f"{node.name}.{method.name}")
    return names


def differences(file: str, first: list[str], second: list[str]) -> set[str]:
    return {f"{file}:{name}" for name in set(first) ^ set(second)}


def test_the_rooms_have_the_same_files() -> None:
    assert files(TORCH) ^ files(TENSORFLOW) == SINGLE.keys()


@pytest.mark.parametrize("file", sorted(files(TORCH) & files(TENSORFLOW)))
def test_a_file_has_the_names_of_its_twin_in_the_same_order(file: str) -> None:
    first, second = public_names(TORCH / file), public_names(TENSORFLOW / file)
    assert differences(file, first, second) == {name for name in DIFFERENT if name.startswith(f"{file}:")}
    shared = set(first) & set(second)
    assert [name for name in first if name in shared] == [name for name in second if name in shared]


@pytest.mark.parametrize("file", sorted(SINGLE))
def test_a_file_without_a_twin_says_why(file: str) -> None:
    path = next(room / file for room in (TORCH, TENSORFLOW) if (room / file).exists())
    assert "Without a twin:" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def test_a_name_of_one_room_alone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class Model:\n    def fit(self): ...\n    def _private(self): ...\n")
    names = public_names(tmp_path / "a.py")
    assert names == ["Model", "Model.fit"]
    assert differences("a.py", names, ["Model"]) == {"a.py:Model.fit"}
