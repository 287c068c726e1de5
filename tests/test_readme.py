"""What the READMEs say holds: their Python runs, their links lead somewhere, and both say the same."""

import re
from pathlib import Path

import pytest

from lmengine.ops.attention import Options

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_examples_run(name, capsys):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert "attention: cpu" in capsys.readouterr().out


def test_both_have_the_same_code_and_commands():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)

    def commands(text):
        blocks = re.findall(r"```(?:sh|python)\n(.*?)```", text, re.DOTALL)
        return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]

    assert commands(english) == commands(chinese)


@pytest.mark.parametrize("name", READMES)
def test_the_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_attention_has_its_options(name):
    """tests/attention/test_features.py holds every one of them on every backend against the reference."""
    text = (ROOT / name).read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|[^|]*\| (?:yes|是) \| (?:yes|是) \| (?:yes|是) \|$", text, re.MULTILINE)
    said_elsewhere = {"cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seed", "deterministic"}
    assert set(listed) - {"kv_heads", "value_dim"} == set(Options.__annotations__) - said_elsewhere
