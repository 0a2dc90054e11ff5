import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.ops import registry

LOGITS = torch.tensor([[1.0, 2.0, 3.0]])


@pytest.fixture
def _forget():
    """What was found out about this process is found out again, before and after."""
    for cached in (registry.missing, registry.extension, registry._warn_once):
        cached.cache_clear()
    yield
    for cached in (registry.missing, registry.extension, registry._warn_once):
        cached.cache_clear()


def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plain_pytorch_always_works():
    assert kdfast.available_backends()[-1] == "torch"
    assert set(kdfast.available_backends()) <= set(registry.BACKENDS)


def test_import_needs_torch_alone():
    heavy = ("transformers", "datasets", "pyarrow", "accelerate", "triton", "matplotlib")
    code = f"import sys, kdfast; print([m for m in {heavy} if m in sys.modules])"
    without = f"import torch, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).stdout == run(without).stdout


def test_a_backend_is_chosen_and_given_back():
    chosen = []
    backends = {name: name for name in registry.BACKENDS}
    with kdfast.backend("torch"):
        chosen.append(registry.select("op", backends, LOGITS))
        with kdfast.backend("auto"):
            chosen.append(registry.select("op", backends, LOGITS))
        chosen.append(registry.select("op", backends, LOGITS))
    with pytest.raises(KeyError), kdfast.backend("torch"):
        raise KeyError
    chosen.append(registry.select("op", backends, LOGITS))
    automatic = "cpp" if "cpp" in kdfast.available_backends() else "torch"
    assert chosen == ["torch", automatic, "torch", automatic]


def test_unknown_and_missing_backends_say_so():
    with pytest.raises(ValueError, match=r"must be one of .*'fortran'"), kdfast.backend("fortran"):
        pass
    with pytest.raises(RuntimeError, match=r"'cuda'.*does not work here: "), kdfast.backend("cuda"):
        pass


def test_a_named_backend_never_falls_back():
    with (
        kdfast.backend("cpp"),
        pytest.raises(RuntimeError, match=r"op: the backend 'cpp' cannot serve.*on meta"),
    ):
        registry.select("op", {"cpp": None, "torch": None}, LOGITS.to("meta"))
    with (
        kdfast.backend("cpp"),
        pytest.raises(RuntimeError, match=r"'cpp' cannot serve .*does not implement"),
    ):
        registry.select("op", {"torch": None}, LOGITS)


@pytest.mark.usefixtures("_forget")
def test_what_no_fused_backend_serves_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(registry, "missing", lambda backend: "not built")
    with pytest.warns(UserWarning, match="runs in plain PyTorch, slowly .cpp: not built"):
        kdfast.kd_loss(LOGITS, LOGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kdfast.kd_loss(LOGITS, LOGITS)


def test_environment_variable():
    loss = "import torch, kdfast; print(kdfast.kd_loss(torch.ones(2, 3), torch.ones(2, 3)))"
    assert run(loss, KDFAST_BACKEND="torch").returncode == 0
    unknown = run(loss, KDFAST_BACKEND="fast")
    assert "KDFAST_BACKEND must be one of" in unknown.stderr
    missing = run(loss, KDFAST_BACKEND="cuda")
    assert "KDFAST_BACKEND asks for 'cuda', which does not work here" in missing.stderr


# An editable installation would find the extension of the checkout for a copy that has none.
COPY_ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, kdfast
x = torch.ones(2, 3)
"""


@pytest.fixture
def copied_package(tmp_path):
    """kdfast's Python files alone, importable from an empty folder."""
    source = Path(kdfast.__file__).parent
    shutil.copytree(source, tmp_path / "kdfast", ignore=shutil.ignore_patterns("_C*"))
    return tmp_path


def test_an_installation_without_the_extension_warns_and_works(copied_package):
    code = "print(kdfast.available_backends())\nfor _ in range(2): kdfast.kd_loss(x, x)"
    result = run(COPY_ALONE + code, folder=copied_package)
    assert result.returncode == 0, result.stderr
    assert "'cpp'" not in result.stdout
    assert result.stderr.count("C++ extension was not built") == 1


def test_an_extension_that_does_not_load_is_an_error_that_says_why(copied_package):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (copied_package / "kdfast" / f"_C{suffix}").write_bytes(b"not a shared object")
    result = run(COPY_ALONE + "kdfast.kd_loss(x, x)", folder=copied_package)
    assert result.returncode != 0
    assert "was built but does not load: " in result.stderr


def test_the_root_of_a_checkout_on_the_path_harms_nobody():
    root = Path(__file__).parent.parent
    assert "No module named 'kernels.kd_loss'" in run("import kernels.kd_loss", root).stderr
    assert run("from transformers import Trainer; import kdfast.kernels", root).returncode == 0
