"""EVODIFF_OFFLINE: commands that fetch by themselves what they were asked for look at this machine only, and say so."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.fixture
def asked(monkeypatch):
    """The hosts that were asked for, in vain; EVODIFF_OFFLINE is set."""
    hosts = []

    def refuse(host, *args, **kwargs):
        hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("EVODIFF_OFFLINE", "1")
    return hosts


@pytest.mark.parametrize("dataset", ["cifar10", "celeba64-ddim", "lsun-bedroom256"])
def test_images_of_a_data_set_are_not_downloaded(evodiff_command, tmp_path, asked, dataset):
    code, _, err = evodiff_command("stats", "build", dataset, "--protocol", "mnist", "--root", str(tmp_path))
    assert code == 1 and asked == []
    assert f"{dataset} is not whole in {tmp_path} and EVODIFF_OFFLINE is set. On a machine with internet" in err
    assert err.count("\n") == 1


PIPELINE = """
import socket

asked = []


def refuse(host, *args, **kwargs):
    asked.append(host)
    raise OSError("no network")


socket.getaddrinfo = refuse
from evodiff.errors import ConfigError
from evodiff.models.latent import latent

try:
    latent("nobody/nothing")
except ConfigError as e:
    print(asked, e)
"""


def test_a_pipeline_of_the_hub_is_not_downloaded():
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    pytest.importorskip("diffusers")
    environment = os.environ | {"EVODIFF_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PIPELINE], env=environment, capture_output=True, text=True)
    said = "[] model.pipeline=nobody/nothing is not here and EVODIFF_OFFLINE is set. On a machine with internet run `hf"
    assert done.stdout.startswith(said), done.stdout + done.stderr
