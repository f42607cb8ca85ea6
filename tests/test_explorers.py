"""The widgets: each callback driven by hand, and each notebook that has one opened in a real JupyterLab."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from helpers.io.paths import ROOT
from helpers.publishing import explorers

DATA = ROOT / "data"
WITH_WIDGETS = ("03_controller_integration", "04_baseline_comparison", "05_gated_generation")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--window-size=1400,1400")  # fmt: skip
SLOW = 150  # seconds that a kernel may take to import everything on a busy machine


def changes(control, value, image) -> bool:
    before, control.value = image.value, value
    return bytes(image.value) != bytes(before) and bytes(image.value).startswith(b"\x89PNG")


def test_width_explorer():
    followed, texts = explorers.load_widths(DATA / "integration_widths.jsonl")
    method, read, image = explorers.width_explorer(followed, texts).children
    assert changes(read, 256, image)
    assert changes(method, "static 4-bit", image)
    assert not changes(read, 256, image)


def test_kept_widths_are_read_as_they_were(tmp_path):
    followed = pd.DataFrame({"method": ["m"], "group": ["static"], "tokens": [2], "peak_bytes": [float("nan")],
                             "live_bytes": [10], "held_bytes": [12], "bits": [[16.0, 3.125]]})  # fmt: skip
    explorers.save_widths(tmp_path / "w.jsonl", followed, ["a", "\n"])
    read, texts = explorers.load_widths(tmp_path / "w.jsonl")
    assert texts == ["a", "\n"]
    kept = followed.drop(columns="peak_bytes").iloc[0].to_dict()
    assert read.to_dict("records") == [{**kept, "bits": [16.0, 3.12]}]
    with pytest.raises(FileNotFoundError, match="03_controller_integration"):
        explorers.load_widths(tmp_path / "none.jsonl")


def test_policy_explorer():
    groups, budget, image = explorers.policy_explorer(pd.read_csv(DATA / "baseline_comparison.csv")).children
    assert changes(budget, 1.8, image)
    assert changes(groups, ("static", "rule"), image)
    assert changes(groups, (), image)  # nothing left: said in the figure


def test_a_budget_shows_what_fits():
    table = pd.read_csv(DATA / "baseline_comparison.csv")
    static = table.set_index("method")["held_bytes"]["static 4-bit"]
    figure = explorers.within_budget(table, 0.9, ("static", "schedule"))
    shown = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    fits = table[(table["held_bytes"] <= 0.9 * static) & table["group"].isin(["static", "schedule"])]
    assert shown == set(fits["method"])
    plt.close(figure)


def test_gate_explorer():
    signal, threshold, image = explorers.gate_explorer(pd.read_csv(DATA / "gate_sweep.csv")).children
    assert changes(threshold, threshold.options[-1][1], image)
    assert changes(signal, "margin", image)


def test_on_paper_no_widget_is_built(monkeypatch, capsys):
    monkeypatch.setenv(explorers.STATIC, "1")
    explorers.show(lambda: pytest.fail("built"))
    assert "JupyterLab" in capsys.readouterr().out


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over copies of the notebooks, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    for stem in WITH_WIDGETS:
        shutil.copy(ROOT / "notebooks" / f"{stem}.ipynb", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / f".{name.lower()}") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PRESET", explorers.STATIC):
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ServerApp.port_retries=0",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address + "/api", server, folder / "lab.log")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(address, server, log):
    started = time.monotonic()
    while time.monotonic() - started < 90:
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("no browser with a driver is installed (chromium and chromedriver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(SLOW)
    yield driver
    driver.quit()


# Run cells one after the other; answers with the names of those that failed.
RUN_CELLS = """
const [cells, done] = arguments;
(async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  for (const cell of cells) {
    panel.content.activeCellIndex = cell;
    await window.jupyterapp.commands.execute('notebook:run-cell');
  }
  const failed = cells.filter(cell => {
    const outputs = panel.content.model.cells.get(cell).outputs;
    return outputs && Array.from({length: outputs.length}, (_, i) => outputs.get(i).type).includes('error');
  });
  done(failed);
})().catch(error => done(String(error)));
"""
READY = """
const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
const session = panel && panel.sessionContext && panel.sessionContext.session;
return !!(session && session.kernel && panel.content.model.cells.length > 5);
"""
LEAVE = """
const done = arguments[0];
const panel = window.jupyterapp.shell.currentWidget;
panel.sessionContext.shutdown().then(() => panel.context.revert()).then(() => done(true), () => done(false));
"""


@pytest.mark.parametrize("stem", WITH_WIDGETS)
def test_a_slider_moves_the_plot_in_jupyterlab(stem, browser, lab):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    code = [number for number, cell in enumerate(cells) if cell.cell_type == "code"]
    widget = [number for number in code if "widget" in cells[number].metadata.get("tags", [])]
    assert len(widget) == 1

    wait = WebDriverWait(browser, SLOW, poll_frequency=0.3)
    browser.get(f"{lab}/lab/tree/{stem}.ipynb?reset")
    wait.until(lambda driver: driver.execute_script(READY))
    assert browser.execute_async_script(RUN_CELLS, [*code[:3], *widget]) == []

    def source(driver):
        images = driver.find_elements(By.CSS_SELECTOR, ".jupyter-widgets img")
        shown = [image for image in images if driver.execute_script("return arguments[0].naturalWidth > 100", image)]
        return shown[0].get_attribute("src") if shown else None

    before = wait.until(source)
    handle = wait.until(lambda driver: driver.find_element(By.CSS_SELECTOR, ".jupyter-widgets .noUi-handle"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", handle)
    position = handle.get_attribute("aria-valuenow")
    handle.send_keys(Keys.ARROW_LEFT if stem.startswith("03") else Keys.ARROW_RIGHT)
    wait.until(lambda driver: handle.get_attribute("aria-valuenow") != position)
    wait.until(lambda driver: source(driver) not in (None, before))
    browser.execute_async_script(LEAVE)
