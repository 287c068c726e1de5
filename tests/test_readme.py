"""What the READMEs say holds: their Python runs, their links lead somewhere, and both say the same."""

import re
from pathlib import Path

import pytest

from lmengine.ops.attention import EVERYTHING, FEATURES

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


@pytest.mark.parametrize(("name", "yes"), [("README.md", "yes"), ("README.zh-CN.md", "是")])
def test_the_table_of_attention_says_what_the_kernels_have(name, yes):
    text = (ROOT / name).read_text(encoding="utf-8")
    for feature in EVERYTHING - {"cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}:
        cells = re.findall(rf"\| `{feature}` \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", text)
        assert len(cells) == 1, feature
        for backend, cell in zip(("cpu", "cuda", "triton"), cells[0], strict=True):
            assert (cell.strip() == yes) == (feature in FEATURES[backend]), (feature, backend)
