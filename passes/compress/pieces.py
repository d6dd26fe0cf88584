"""Compressing a block with a very large weight some rows at a time.

Embeddings and LM head have a row of weights for each token of the vocabulary. Their rows are compressed independently of each
other, so memory need not hold more than a piece of them: each piece is compressed as a block of its own with a smaller
vocabulary, and the results are joined on the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.export.ir import BLOCK_FILE, detach, write
from passes.export.openvino import save_block
from passes.export.template import BlockSource
from passes.export.weights import WeightBytes
from passes.tables import large_table, pieces

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["compress_block"]

_CHUNK = 1 << 20
# Constants of fewer bytes are axes and shapes; scales and zero points of a piece have more.
_SMALL = 64


def compress_block(compress: Callable[[BlockSource], ov.Model], source: BlockSource, output: Path) -> None:
    """Compress a block, and write it; a large weight with a row for each token is compressed in pieces.

    Args:
        compress: returns the compressed graph of a block; the result for a row must not depend on other rows.
        source: the block.
        output: an existing empty folder.
    """
    shapes = {tensor: source.tensor_info(tensor).shape for tensor in source.block.tensors.values()}
    large = large_table(source.block, shapes)
    if large is None:
        save_block(compress(source), source, output)
    else:
        _compress_in_pieces(compress, source, large, output)


def _compress_in_pieces(
    compress: Callable[[BlockSource], ov.Model], source: BlockSource, tensor: str, output: Path
) -> None:
    shape = source.tensor_info(tensor).shape
    rows = shape[0]
    with tempfile.TemporaryDirectory(prefix=".pieces-", dir=output) as temporary:
        joined: dict[str, Path] = {}
        for number, (first, last) in enumerate(pieces(shape)):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            piece = source.with_rows(tensor, first, last)
            save_block(compress(piece), piece, folder)
            model, weights = detach(folder / BLOCK_FILE, str, _SMALL)
            for name, place in weights.items():
                if name.startswith(tensor):
                    joined.setdefault(name, Path(temporary) / f"{len(joined)}.bin")
                    _append(place, joined[name])
            if last < rows:
                shutil.rmtree(folder)
        _set_rows(model, set(joined), last - first, rows)
        weights |= {name: WeightBytes(path, 0, path.stat().st_size) for name, path in joined.items()}
        write(model, weights, output / BLOCK_FILE)


def _append(place: WeightBytes, path: Path) -> None:
    left = place.size
    with place.file.open("rb") as stream, path.open("ab") as joined:
        stream.seek(place.offset)
        while left:
            chunk = stream.read(min(left, _CHUNK))
            joined.write(chunk)
            left -= len(chunk)


def _set_rows(model: ov.Model, names: set[str], old: int, new: int) -> None:
    """Give the graph of a piece the number of rows of the whole weight.

    Args:
        model: the graph with its weights as inputs.
        names: names of the inputs that have a row for each row of the weight.
        old: number of rows of the piece.
        new: number of rows of the whole weight.
    """
    from openvino import opset13

    for parameter in model.get_parameters():
        if parameter.get_friendly_name() in names:
            shape = parameter.get_partial_shape()
            shape[0] = new
            parameter.set_partial_shape(shape)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape":
            continue
        wanted = node.input_value(1).get_node()
        if wanted.get_type_name() == "Constant" and wanted.data.size and wanted.data.ravel()[0] == old:
            values = np.array(wanted.data)
            values.ravel()[0] = new
            constant = opset13.constant(values, name=wanted.get_friendly_name())
            node.input(1).replace_source_output(constant.output(0))
    model.validate_nodes_and_infer_types()
