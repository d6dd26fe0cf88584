import subprocess
import sys
from pathlib import Path


def test_imports_run_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([tool], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
