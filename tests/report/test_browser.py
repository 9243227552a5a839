"""Pages in Chromium, without a network: no error, no live node of a name, readable in light and in dark."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from pages import DRAWN, ELEMENTS, Outline
from PIL import Image
from report_folder import EPS, Maker, T

from kd.report.__main__ import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium"),
]
QUIET = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking"
DARK = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]


def opened(page, place, *options):
    """What Chromium printed of a page, and the grey values of its picture."""
    picture = place / "picture.png"
    offline = [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={place / 'profile'}",
    ]
    size = ["--window-size=1200,1400", f"--screenshot={picture}", "--dump-dom"]
    words = [CHROMIUM, *QUIET.split(), *offline, *size, *options, page.as_uri()]
    env = {**os.environ, "HOME": str(place)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=env)
    return done, np.asarray(Image.open(picture).convert("L"), dtype=float)


def test_a_page_is_readable_in_light_and_in_dark_and_asks_for_nothing(tmp_path):
    study = Maker(tmp_path / "it", axes={EPS: [0.0, 0.4], T: [1.0, 4.0]}, text=lambda name: f"<img src=x>{name}")
    folder = study.contrast("harm", {"eps": 0.4}, {"eps": 0.0}).write()
    assert main([f"study={folder}"]) == 0
    light, dark = (opened(folder / "report.html", tmp_path, *options) for options in ([], DARK))
    for done, _ in (light, dark):
        assert done.stdout.count("<svg") >= 8
        assert {tag for tag, _ in Outline(done.stdout).elements} <= ELEMENTS | DRAWN
        # A page that asked for anything would break its own policy, which the console would tell.
        assert "CONSOLE" not in done.stderr
        assert "Content Security Policy" not in done.stderr
    assert np.median(light[1]) > 240
    assert np.median(dark[1]) < 40
    for _, picture in (light, dark):  # ink on paper: something is far from the background, not much of it
        far = np.abs(picture - np.median(picture)) > 100
        assert 0.005 < far.mean() < 0.3
