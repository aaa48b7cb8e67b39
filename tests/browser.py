"""Chromium without a window, driven over the DevTools protocol: JSON messages through two pipes.

https://chromedevtools.github.io/devtools-protocol/ describes the methods.
"""
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-pipe",
]
SECONDS = 60  # until a reply or a condition is overdue; generous, for a loaded machine
KEY_CODES = {"Backspace": 8, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
             "ArrowDown": 40}


class Browser:
    """One page of a browser that has its own empty profile.  Use it as a context manager.

    events: [(method, params)] that the browser has reported, such as Runtime.exceptionThrown
    """

    def __init__(self, profile):
        child_in, self.commands = os.pipe()
        self.replies, child_out = os.pipe()
        self.pid = spawn([CHROMIUM, *FLAGS, f"--user-data-dir={profile}"], child_in, child_out)
        self.buffer = b""
        self.last_id = 0
        self.events = []
        self.session = None
        self.is_ended = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.session = None
        try:
            self.send("Browser.close")
            wait_until(self.has_ended)
        finally:
            if not self.is_ended:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            os.close(self.commands)
            os.close(self.replies)

    def has_ended(self):
        self.is_ended = os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        return self.is_ended

    def send(self, method, **params):
        """Call a method of the protocol -> its result"""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            reply = self.read_message(deadline)
            if reply.get("id") == self.last_id:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self.events.append((reply.get("method"), reply.get("params")))

    def read_message(self, deadline):
        while b"\0" not in self.buffer:
            seconds = max(0, deadline - time.monotonic())
            assert select.select([self.replies], [], [], seconds)[0], "the browser does not answer"
            content = os.read(self.replies, 2 ** 20)
            assert content, "the browser has ended"
            self.buffer += content
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        """Evaluate JavaScript in the page -> its value"""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition):
        """Wait until a JavaScript expression is true -> its value"""
        def evaluate():
            return self.run(condition)

        return wait_until(evaluate)

    def open(self, path):
        """Open a file and wait until it has loaded."""
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for(f"document.readyState === 'complete' && location.href === '{path.as_uri()}'")

    def press(self, *keys):
        for key in keys:
            event = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, 0)}
            text = {"text": key} if len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def resize(self, width, height, is_dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        scheme = "dark" if is_dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self):
        """What the window shows, once it is drawn -> bytes of a PNG"""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


def wait_until(condition):
    """Call a function until its value is true -> the value"""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never true: {condition}"
        time.sleep(0.02)
    return value


def spawn(command, child_in, child_out):
    """Start a command in a process group of its own with two descriptors as 3 and 4 -> its pid"""
    high_in = fcntl.fcntl(child_in, fcntl.F_DUPFD_CLOEXEC, 10)  # neither is 3 or 4 itself
    high_out = fcntl.fcntl(child_out, fcntl.F_DUPFD_CLOEXEC, 10)
    actions = [
        (os.POSIX_SPAWN_DUP2, high_in, 3),
        (os.POSIX_SPAWN_DUP2, high_out, 4),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
    for descriptor in (child_in, child_out, high_in, high_out):
        os.close(descriptor)
    return pid
