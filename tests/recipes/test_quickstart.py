"""recipes/quickstart.py, cut short."""

import re

from recipes.quickstart import main


def test_the_adapter_learns_and_loads(tmp_path, capsys):
    main(steps=51, folder=str(tmp_path))
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"loss (\S+)", printed))
    assert last < 0.5 * first
    assert len(re.findall(r"counting (up|down), mean route of block [0-3]: ", printed)) == 8
    assert "same logits after loading: True" in printed
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
