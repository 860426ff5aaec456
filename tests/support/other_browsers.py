"""The chat page in the Firefox and WebKit of Debian. WebDriver drives them, because Playwright needs its own builds."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

PROGRAMS = {"firefox": ("firefox", "geckodriver"), "webkit": ("WebKitWebDriver", "Xvfb")}
WAIT_SECONDS = 30

COMPOSER = "[data-testid=composer]"
ANSWER = "[data-testid=message-assistant]"
LAST_ANSWER = f"{ANSWER}[data-last=true]"
CONVERSATION = "[data-testid=conversation-item] a"

_NOT_YET = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)

# The storage of the tab keeps the problems of the page over a reload.
_NOTE_PROBLEMS = """() => {
    const KEY = "test.problems";
    const note = (text) => sessionStorage.setItem(KEY, `${sessionStorage.getItem(KEY) ?? ""}${text}\\n`);
    addEventListener("error", (event) => note(event.message));
    addEventListener("unhandledrejection", (event) => note(String(event.reason)));
    addEventListener("securitypolicyviolation", (event) => note(`${event.violatedDirective}: ${event.blockedURI}`));
}"""

# Firefox's interface for tests of input methods. It causes the events that a real input method causes.
_COMPOSE_IN_FIREFOX = """
const browser = Services.wm.getMostRecentWindow("navigator:browser");
const input = Cc["@mozilla.org/text-input-processor;1"].createInstance(Ci.nsITextInputProcessor);
if (!input.beginInputTransactionForTests(browser, () => true)) throw new Error("no input transaction");
input.setPendingCompositionString("に");
input.appendClauseToPendingComposition(1, input.ATTR_RAW_CLAUSE);
input.setCaretInPendingComposition(1);
input.flushPendingComposition(new browser.KeyboardEvent("", { key: "n", code: "KeyN", keyCode: 78 }));
input.commitComposition(new browser.KeyboardEvent("", { key: "Enter", code: "Enter", keyCode: 13 }));
"""

_COPY_IN_FIREFOX = """
Cc["@mozilla.org/widget/clipboardhelper;1"].getService(Ci.nsIClipboardHelper).copyString(arguments[0]);
"""
_PASTE_EVENT = """
const clipboardData = new DataTransfer();
clipboardData.setData("text/plain", arguments[0]);
const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
document.activeElement.dispatchEvent(event);
"""

Result = TypeVar("Result")


def with_id(name: str) -> str:
    """The selector of the elements with this test id."""
    return f"[data-testid={name}]"


def labeled(label: str) -> str:
    """The selector of the elements with this accessible name."""
    return f"[aria-label='{label}']"


class Tab:
    """One tab with the chat page. CSS selectors name its elements, and each wait has a limit of 30 seconds."""

    def __init__(self, browser: "OtherBrowser", handle: str) -> None:
        self._browser = browser
        self._handle = handle

    async def run(self, function: str, *arguments: object) -> Any:
        """Calls a JavaScript function in the page."""
        return await self._do(lambda driver: driver.execute_script(f"return ({function})(...arguments)", *arguments))

    async def until(self, function: str, *arguments: object) -> None:
        """Waits until a JavaScript function returns true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not await self.run(function, *arguments):
            await self._pause(deadline, f"{function} {arguments}")

    async def click(self, selector: str) -> None:
        await self._act(selector, lambda element: element.click())

    async def type(self, selector: str, *keys: str) -> None:
        """Types into an element. A file input takes the path of a file."""
        await self._act(selector, lambda element: element.send_keys(*keys))

    async def press(self, key: str, *, control: bool = False) -> None:
        """Presses a key where the focus is."""

        def pressed(driver: WebDriver) -> None:
            if control:
                ActionChains(driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()
            else:
                ActionChains(driver).send_keys(key).perform()

        await self._do(pressed)

    async def compose(self) -> None:
        """Writes the character "に" with an input method where the focus is. An Enter ends its composition."""

        def composed(driver: WebDriver) -> None:
            if isinstance(driver, webdriver.Firefox):
                with driver.context(driver.CONTEXT_CHROME):
                    driver.execute_script(_COMPOSE_IN_FIREFOX)
                return
            # GTK's own input method takes the number of a character after Ctrl+Shift+U.
            keys = ActionChains(driver).key_down(Keys.CONTROL).key_down(Keys.SHIFT).send_keys("u")
            keys.key_up(Keys.SHIFT).key_up(Keys.CONTROL).send_keys("306b", Keys.ENTER).perform()

        await self._do(composed)

    async def paste(self, text: str) -> None:
        """Pastes a text where the focus is."""

        def pasted(driver: WebDriver) -> None:
            if not isinstance(driver, webdriver.Firefox):
                driver.execute_script(_PASTE_EVENT, text)
                return
            with driver.context(driver.CONTEXT_CHROME):
                driver.execute_script(_COPY_IN_FIREFOX, text)
            ActionChains(driver).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()

        await self._do(pasted)

    async def scroll(self, selector: str, pixels: int) -> None:
        """Turns the mouse's wheel over an element; a negative number scrolls up."""

        def scrolled(driver: WebDriver) -> None:
            origin = ScrollOrigin.from_element(driver.find_element(By.CSS_SELECTOR, selector))
            ActionChains(driver).scroll_from_origin(origin, 0, pixels).perform()

        await self._do(scrolled)

    async def ask(self, text: str) -> None:
        """Sends a message without waiting for its answer."""
        await self.type(COMPOSER, text, Keys.ENTER)

    async def expect_state(self, state: str) -> None:
        """Waits until the last answer is in this state."""
        await self.expect_count(f"{LAST_ANSWER}[data-state={state}]", 1)

    async def expect_count(self, selector: str, count: int) -> None:
        """Waits until there are ``count`` such elements."""
        await self.until("(selector, count) => document.querySelectorAll(selector).length === count", selector, count)

    async def expect_text(self, selector: str, text: str) -> None:
        """Waits until the first such element contains the text."""
        contains = "(selector, text) => document.querySelector(selector)?.textContent.includes(text)"
        await self.until(contains, selector, text)

    async def expect_value(self, selector: str, value: str) -> None:
        """Waits until the field has this value."""
        await self.until("(selector, value) => document.querySelector(selector)?.value === value", selector, value)

    async def load(self, url: str) -> None:
        await self._do(lambda driver: driver.get(url))
        await self.run(_NOTE_PROBLEMS)

    async def reload(self) -> None:
        await self._do(lambda driver: driver.refresh())
        await self.run(_NOTE_PROBLEMS)

    async def close(self) -> None:
        await self._do(lambda driver: driver.close())
        self._browser.forget(self)

    async def _do(self, action: Callable[[WebDriver], Result]) -> Result:
        """Runs an action in a thread, because Selenium blocks, and the gateway runs in the event loop of the test."""
        return await asyncio.to_thread(self._browser.in_tab, self._handle, action)

    async def _act(self, selector: str, action: Callable[[WebElement], None]) -> None:
        """Does something with an element as soon as it is there and nothing covers it."""

        def acted(driver: WebDriver) -> bool:
            with contextlib.suppress(*_NOT_YET):
                action(driver.find_element(By.CSS_SELECTOR, selector))
                return True
            return False

        deadline = time.monotonic() + WAIT_SECONDS
        while not await self._do(acted):
            await self._pause(deadline, f"an element {selector} to act on")

    async def _pause(self, deadline: float, awaited: str) -> None:
        """Waits a moment before the next look. Raises AssertionError after the deadline."""
        if time.monotonic() > deadline:
            shown = await self.run("() => document.body.innerText")
            raise AssertionError(f"waited {WAIT_SECONDS} s for {awaited}. The page shows:\n{shown}")
        await asyncio.sleep(0.05)


class OtherBrowser:
    """A browser with a storage of its own, which its tabs share. It downloads files into the folder ``downloads``."""

    def __init__(self, name: str, driver: WebDriver, downloads: Path) -> None:
        self.name = name
        self.downloads = downloads
        self._driver = driver
        self._tabs: list[Tab] = []
        self._current: str | None = None

    async def open(self, url: str) -> Tab:
        """Opens the page in a new tab. The first page gets the tab with which the browser has started."""
        if self._tabs:
            await asyncio.to_thread(self._driver.switch_to.new_window, "tab")
        self._current = await asyncio.to_thread(lambda: self._driver.current_window_handle)
        tab = Tab(self, self._current)
        self._tabs.append(tab)
        await tab.load(url)
        return tab

    def in_tab(self, handle: str, action: Callable[[WebDriver], Result]) -> Result:
        """Runs an action after a change to the tab. Firefox then shows the tab; WebKit leaves it in the background."""
        if self._current != handle:
            self._driver.switch_to.window(handle)
            self._current = handle
        return action(self._driver)

    def forget(self, tab: Tab) -> None:
        self._tabs.remove(tab)
        self._current = None

    async def problems(self) -> list[str]:
        """Script errors and violations of the Content-Security-Policy in the open tabs."""
        found = [await tab.run("() => sessionStorage.getItem('test.problems')") for tab in self._tabs]
        return [text for text in found if text]


def missing_programs(name: str) -> list[str]:
    """The programs for the browser ``name`` that this machine lacks."""
    return [program for program in PROGRAMS[name] if shutil.which(program) is None]


@contextlib.asynccontextmanager
async def other_browser(name: str, folder: Path) -> AsyncIterator[OtherBrowser]:
    """Runs a browser, with its files in ``folder``, until the block ends. A problem in a tab is an AssertionError."""
    with _firefox(folder) if name == "firefox" else _webkit(folder) as driver:
        browser = OtherBrowser(name, driver, folder)
        yield browser
        problems = await browser.problems()
        assert not problems, problems


@contextlib.contextmanager
def _firefox(folder: Path) -> Iterator[WebDriver]:
    options = webdriver.FirefoxOptions()
    options.add_argument("-headless")
    options.set_preference("browser.download.folderList", 2)  # take the folder of the next preference
    options.set_preference("browser.download.dir", str(folder))
    # Tab.compose uses a part of Firefox that is not open to pages.
    arguments = ["--allow-system-access"]
    service = webdriver.FirefoxService(
        shutil.which("geckodriver"), service_args=arguments, log_output=str(folder / "geckodriver.log")
    )
    driver = webdriver.Firefox(options, service)
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def _webkit(folder: Path) -> Iterator[WebDriver]:
    (folder / "user-dirs.dirs").write_text(f'XDG_DOWNLOAD_DIR="{folder}"\n')
    with _display() as display:
        environment = {
            **os.environ,
            "DISPLAY": display,
            "GDK_BACKEND": "x11",
            "GTK_IM_MODULE": "gtk-im-context-simple",
            "XDG_CONFIG_HOME": str(folder),
        }
        service = webdriver.WebKitGTKService(
            shutil.which("WebKitWebDriver"), env=environment, log_output=str(folder / "webkit.log")
        )
        driver = webdriver.WebKitGTK(webdriver.WebKitGTKOptions(), service)
        try:
            yield driver
        finally:
            driver.quit()


@contextlib.contextmanager
def _display() -> Iterator[str]:
    """Runs an X server without a screen, and yields its name."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1280x900x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as server:
        os.close(writing)
        try:
            with open(reading) as number:
                yield f":{number.readline().strip()}"
        finally:
            server.terminate()
