"""A prepared folder: with traces or without, it tells of the architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from manifests.errors import ConversionError
from passes.architecture import read_architecture
from passes.checkpoint import open_checkpoint
from passes.export.template import Templates, prepare, trace
from vlmconvert.families import load_family


@dataclass(frozen=True)
class Changed:
    """The demo's components with a block's weights changed."""

    weights: dict[str, str]

    def __call__(self, config):
        vision, language = load_family("mllama").components(config)
        blocks = (replace(language.blocks[0], weights=self.weights), *language.blocks[1:])
        return (vision, replace(language, blocks=blocks))


def prepared(demo, folder, describe) -> Templates:
    prepare(demo, list(open_checkpoint(demo).tensors), describe, folder)
    return Templates(folder)


@pytest.mark.parametrize("traced", [True, False])
def test_what_transformers_says_is_read_back(demo, tmp_path, traced):
    family = load_family("mllama")
    templates = prepared(demo, tmp_path, family.components)
    if traced:
        (tmp_path / "traced").mkdir()
        trace(tmp_path, family.components, tmp_path / "traced")
        templates = Templates(tmp_path / "traced")
    architecture = read_architecture(demo, list(open_checkpoint(demo).tensors))
    assert templates.architecture == architecture
    assert templates.names == architecture.names
    components = tuple(component.bound(templates.shapes) for component in family.components(templates.config))
    for component in components:
        for block in component.blocks:
            assert list(block.tensors) == list(templates.shapes[block.kind])
            for parameter, tensor in block.tensors.items():
                assert templates.shapes[block.kind][parameter] == architecture.shapes[tensor]
    traces = {f"{kind}.{suffix}" for kind in templates.shapes for suffix in ("xml", "bin")}
    assert traces & {path.name for path in templates.folder.iterdir()} == (traces if traced else set())


@pytest.mark.parametrize("weights", [{}, {"embed_tokens": "model.language_model.embed_tokens", "norm": "model.norm"}])
def test_weights_that_are_not_the_modules_are_refused(demo, tmp_path, weights):
    with pytest.raises(ConversionError, match="block embed_tokens"):
        prepared(demo, tmp_path, Changed(weights))
