"""The page of `illada demo` as a visitor has it: the real server process on loopback, and a headless Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

# The command, in a process that reports every attempt to reach another machine.
COMMAND = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", None):
            print("REACHES FOR", address, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from illada.commands.main import main
main()
"""


def what_is_missing() -> str:
    """What the page cannot be tried without on this machine; empty if all is here."""
    packages = [name for name in ("gradio", "selenium") if find_spec(name) is None]
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return ", ".join(packages + programs)


class DemoServer:
    """A context manager: the process, until it answers at `url`; `log()` is what it has printed."""

    def __init__(self, log_file: Path, timeout: float = 120):
        self.log_file, self.timeout = log_file, timeout

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "demo", "--port", str(port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        deadline = time.monotonic() + self.timeout
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"`illada demo` did not come up: {self.log()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(30)

    def _answers(self) -> bool:
        try:
            return build_opener(ProxyHandler({})).open(self.url, timeout=5).status == 200
        except (URLError, OSError):
            return False

    def log(self) -> str:
        return self.log_file.read_text()


class Visitor:
    """A context manager: a browser with the page open, in which every wait has an end."""

    def __init__(self, url: str, timeout: float = 60, width: int = 1280, height: int = 1000):
        self.url, self.timeout, self.size = url, timeout, (width, height)

    def __enter__(self):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--force-device-scale-factor=1.5",
            "--window-size={},{}".format(*self.size),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.get(self.url)
        self.find("#message textarea")
        return self

    def __exit__(self, *exception):
        self.driver.quit()

    def wait(self, condition, what: str):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, self.timeout, 0.05, [StaleElementReferenceException])
        return wait.until(lambda _: condition(), what)

    def find(self, selector: str):
        """The first visible element, as soon as there is one."""

        def visible():
            found = self.driver.find_elements("css selector", selector)
            return next((element for element in found if element.is_displayed()), None)

        return self.wait(visible, f"no {selector}")

    def click(self, selector: str, text: str = ""):
        """Clicks the first visible element that holds the text."""

        def clickable():
            found = self.driver.find_elements("css selector", selector)
            return next((element for element in found if element.is_displayed() and text in element.text), None)

        self.driver.execute_script("arguments[0].click()", self.wait(clickable, f"no {selector} with {text!r}"))

    def type(self, selector: str, text: str, end: str = ""):
        """Writes the text in place of a field's, and then presses the keys `end`."""
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, text, end)

    def value(self, selector: str) -> str:
        return self.find(selector).get_property("value")

    def run(self, start) -> list[dict]:
        """Calls `start`, waits until the denoising that it begins is done, and returns every state that was shown."""
        self.driver.execute_script(
            """
            window.seen = [];
            document.querySelector("#canvas").dataset.state = "before";
            const answers = () => [...document.querySelectorAll("#conversation .assistant")];
            window.observer ??= new MutationObserver(() => {
              const canvas = document.querySelector("#canvas"), count = s => canvas.querySelectorAll(s).length;
              window.seen.push({state: canvas.dataset.state, masked: count(".mask"), committed: count(".committed"),
                                passes: +document.querySelector("#passes").textContent,
                                answer: answers().at(-1)?.textContent});
            });
            const changes = {subtree: true, childList: true, attributes: true, characterData: true};
            window.observer.observe(document.body, changes);
            """
        )
        start()
        self.wait(lambda: self.find("#canvas").get_attribute("data-state") == "done", "the denoising does not end")
        return [state for state in self.driver.execute_script("return window.seen") if state["state"] != "before"]

    def requested_urls(self) -> list[str]:
        """What the page asked the network for."""
        import json

        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
