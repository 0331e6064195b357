"""Signals: caught between install and uninstall, and given back."""

import os
import signal

import pytest

from fbpc_ray.core.config import Config
from fbpc_ray.core.signals import Interrupted, Interruption
from fbpc_ray.execution.session import open_backend


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_backend_gives_the_signal_handlers_back():
    """Also when its block fails."""
    before, inside = handlers(), []
    with open_backend(Config().updated(backend="serial", device="cpu"), Interruption(), print):
        inside = handlers()
    assert handlers() == before
    assert not set(inside) & set(before)
    with (
        pytest.raises(ZeroDivisionError),
        open_backend(Config().updated(backend="serial", device="cpu"), Interruption(), print),
    ):
        raise ZeroDivisionError
    assert handlers() == before


def test_a_signal_is_a_flag_until_it_is_checked(capsys):
    interruption = Interruption()
    interruption.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.number == signal.SIGTERM
        assert "Stopping after this step" in capsys.readouterr().err
        with pytest.raises(Interrupted) as caught:
            interruption.check()
        assert caught.value.code == 128 + signal.SIGTERM
    finally:
        interruption.uninstall()


def test_installed_twice_the_first_handlers_come_back():
    before, interruption = handlers(), Interruption()
    interruption.install()
    interruption.install()
    interruption.uninstall()
    assert handlers() == before
