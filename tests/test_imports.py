import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vlmconvert.families import FAMILIES

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


class WithoutProse(ast.NodeTransformer):
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


# Keys, tensors and outputs of processors that not all families have; underscores are left out.
WORDS = (
    "aspectratio",
    "crossattentionlayers",
    "crossattentionmask",
    "crossattnk",
    "gridpinpoints",
    "imagenewline",
    "imagetokenindex",
    "numadditionalimagetokens",
    "resampler",
    "videotokenindex",
    "visionfeaturelayer",
    "visionfeatureselectstrategy",
)


def lines_with_a_family(source):
    """Lines of code, without comments and docstrings, whose names or strings hold what only a family knows, in any spelling."""
    names = {name.replace("-", "") for name in FAMILIES.names}.union(WORDS)
    code = ast.unparse(WithoutProse().visit(ast.parse(source)))
    lines = code.lower().replace("-", "").replace("_", "").splitlines()
    return [line.strip() for line in lines if any(name in line for name in names)]


@pytest.mark.parametrize("folder", ["passes", "calibration", "manifests"])
def test_below_the_families_none_is_known(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): lines_with_a_family(file.read_text(encoding="utf-8")) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_a_familys_name_or_word_is_found_in_code_alone():
    assert lines_with_a_family('"""Of LLaVA."""\nx = 1  # mllama\ndef f():\n    """For mllama."""\n') == []
    for code in (
        "x == 'llava_next'",
        "f'examples/{x}/mllama'",
        "from vlmconvert.families import llava",
        "MllamaModel()",
        "config['cross_attention_layers']",
        "arrays['cross_attention_mask']",
        "x = config.get('image_token_index')",
        "processor.num_additional_image_tokens = 1",
        "vision_feature_select_strategy == 'full'",
    ):
        assert lines_with_a_family(code)
