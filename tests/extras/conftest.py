"""The command line in this process, a model that speaks in words, some pictures, and kinds of packed layers."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pictures import make_picture
from talkers import Screen, make_talker

import llama
import llava
from extras import cli, fbgemm, packed, speed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def ours(folder):
    """(model, processor): what the command line should be using."""
    return llava.load(folder, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return [make_picture(tmp_path_factory.mktemp("pictures") / f"{seed}.png", seed) for seed in range(3)]


@pytest.fixture
def main(capsys):
    """arguments → exit status, stdout, stderr."""

    def main(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse leaves by itself
            status = left.code
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return main


@pytest.fixture
def ask(main, folder):
    return lambda *arguments: main("--model", folder, "--device", "cpu", *arguments)


@pytest.fixture
def watch(monkeypatch, ask):
    """arguments → the screen on which the answer appeared."""

    def watch(*arguments):
        screen, forward = Screen(), llama.Llama.forward

        def counted(self, x, *args, **kwargs):
            screen.passes += 1
            screen.rows.add(len(x))
            return forward(self, x, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(llama.Llama, "forward", counted)
            patch.setattr(sys, "stdout", screen)
            assert ask(*arguments).status == 0
        return screen

    return watch


@pytest.fixture(params=packed.KINDS)
def kind(request, monkeypatch):
    """A kind of packed layer that this machine has, and that load takes without timing any."""
    if not {"packed": packed.PackedLinear.works(torch.bfloat16), "packed by FBGEMM": fbgemm.works()}[request.param]:
        pytest.skip("this processor does not multiply bfloat16 so")
    monkeypatch.setitem(speed.FIXED, "products", request.param)
    monkeypatch.setattr(packed, "kinds", lambda dtype: {request.param: packed.KINDS[request.param]})
    return packed.KINDS[request.param]
