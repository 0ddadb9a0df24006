"""A small HTTP server for this machine that slow clients cannot hold up.

One event loop talks to all clients; one thread (or a few) does the work, a request after the other. A client that is
slow, or stalls, costs a socket and a few kilobytes until its time is up. It never holds a thread, nor a place in the
queue: those are for requests that have arrived completely.

Neither uvicorn with starlette nor waitress sets a time for a request's head or body, and all of the limits below would
have to be written around them as well (tried with uvicorn 0.54, starlette 1.10 and waitress 3.0.2).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

MAX_HEAD = 16_384
"""Most bytes of a request's first line and headers."""
MAX_HEADERS = 100
_PIECE = 65_536
_OVERHEAD = 64
"""Descriptors of files that the process keeps for itself."""


@dataclass(frozen=True)
class Patience:
    """Seconds that a client has."""

    head: float = 10.0
    """For its first line and headers."""
    idle: float = 10.0
    """Between two pieces of its upload."""
    body: float = 60.0
    """For its upload as a whole, however steadily it arrives."""
    answer: float = 60.0
    """For taking the answer."""
    end: float = 120.0
    """For the work that runs when the server is stopped."""


@dataclass(frozen=True)
class Limits:
    """What clients may take of this machine together."""

    upload: int = 25_000_000
    """Bytes of one upload."""
    in_memory: int = 65_536
    """Bytes of an upload that are kept in memory; a larger one lies in a temporary file."""
    arriving: int = 1_000_000_000
    """Bytes of all uploads that have arrived and are not answered yet."""
    unsent: int = 200_000_000
    """Bytes of all answers that clients have not taken yet. Nothing new is begun beyond."""
    waiting: int = 7
    """Complete uploads that wait while others are worked on."""
    connections: int = 256
    """Open connections. One more pushes out the one that has been sending its head for longest."""


@dataclass(frozen=True)
class Request:
    """The head of a request."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, and values, in the order of the request."""

    def all(self, name: str) -> list[str]:
        """The values of a header; its name in lower case."""
        return [value for key, value in self.headers if key == name]

    def one(self, name: str, default: str = "") -> str:
        """The last value of a header; its name in lower case."""
        return [default, *self.all(name)][-1]


@dataclass(frozen=True)
class Answer:
    """What a client gets."""

    body: bytes
    kind: str
    """Type of the content."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    """A request is refused. The answer is a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


Work = Callable[[BinaryIO], Answer]
"""Makes the answer to an upload, in the working thread; may raise a RefusedError."""


class HttpServer:
    """Answers on one port until `shutdown`. One request a connection.

    A subclass says what is answered: `get`, `post` and `refusal`.
    """

    limits = Limits()

    def __init__(
        self,
        host: str,
        port: int,
        patience: Patience | None = None,
        log: Callable[[str], None] = lambda text: None,
        at_once: int = 1,
    ) -> None:
        """Listen.

        Args:
            at_once: uploads that are worked on at the same time, each in a thread.

        Raises:
            OSError, OverflowError: the port is taken, or no port.
        """
        self.patience, self.log = patience or Patience(), log
        self._socket = socket.create_server((host, port), backlog=256)
        self.server_address: tuple[str, int] = self._socket.getsockname()
        self.server_port = self.server_address[1]
        self._most = _connections(self.limits.connections)
        self._open: dict[asyncio.Task[None], str] = {}
        self._busy = self._arrived = self._unsent = 0
        self._answered: Counter[int] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._stopping: asyncio.Event | None = None
        self._at_once = at_once
        self._worker = concurrent.futures.ThreadPoolExecutor(at_once, "everseg-serve")

    # ---------------------------------------------------------------- to be said by a subclass

    def get(self, request: Request) -> Answer:
        """Answer a GET request, quickly: all clients wait. May raise a RefusedError."""
        raise NotImplementedError

    def post(self, request: Request) -> Work:
        """Check the head of a POST request, and say what is to be done with its upload. May raise a RefusedError."""
        raise NotImplementedError

    def refusal(self, status: int, text: str) -> Answer:
        """Word a refusal."""
        raise NotImplementedError

    def check(self, request: Request) -> None:
        """Refuse requests of whatever method. May raise a RefusedError."""

    # ---------------------------------------------------------------- life

    def serve_forever(self) -> None:
        """Answer until `shutdown` is called in another thread."""
        try:
            asyncio.run(self._run())
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """Stop: no new request, no new work; work that runs is finished and answered. Returns when that is done."""
        self._stop.set()
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        while not self._ended.wait(0.5):  # without a time limit, Windows would not notice Ctrl-C
            pass

    def server_close(self) -> None:
        """Free the port."""
        self._socket.close()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.server_close()

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._report)
        if not self._stop.is_set():
            server = await asyncio.start_server(
                self._connected, sock=self._socket, limit=MAX_HEAD, backlog=256
            )
            await self._stopping.wait()
            server.close()
        for task, doing in self._open.items():
            if doing != "work":
                task.cancel()
        if self._open:
            await asyncio.wait(list(self._open), timeout=self.patience.end)

    def _report(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """Log what goes wrong between the connections, such as too many open files."""
        error = context.get("exception")
        if not isinstance(error, ConnectionError):
            self.log(f"the server goes on after {type(error).__name__ if error else context.get('message')}")

    def figures(self) -> dict[str, int]:
        """Return what is going on: connections, uploads that wait or are worked on, bytes held."""
        return {
            "connections": len(self._open), "busy": self._busy, "upload_bytes": self._arrived,
            "unsent_bytes": self._unsent,
        }  # fmt: skip

    # ---------------------------------------------------------------- one connection

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        full = len(self._open) >= self._most and not self._make_room()
        self._open[task] = "head"
        try:
            if full:
                await self._send(
                    writer, self._word(RefusedError(503, "Too many connections: try again in a moment."))
                )
            else:
                await self._converse(task, reader, writer)
            writer.close()
            async with asyncio.timeout(self.patience.answer):
                await writer.wait_closed()  # the end of the answer may still wait to be sent
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client is gone, too slow (TimeoutError is an OSError), or the server ends.
            writer.transport.abort()
        finally:
            del self._open[task]

    def _make_room(self) -> bool:
        """Push out the connection that has been sending its head for longest."""
        for task, doing in self._open.items():
            if doing == "head":
                self._open[task] = "pushed out"
                task.cancel()
                return True
        return False

    async def _converse(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        refused = True
        try:
            request = await self._head(reader)
            self._open[task] = "body"
            with self._telling():
                self.check(request)
            if request.method == "GET":
                with self._telling():
                    answer = self.get(request)
            elif request.method == "POST":
                answer = await self._post(task, request, reader, writer)
            else:
                raise RefusedError(501, "Only GET and POST are answered here.")
            refused = False
        except RefusedError as refusal:
            answer = self._word(refusal)
        except (OSError, asyncio.IncompleteReadError):  # of the connection: `_telling` words all others
            raise
        except Exception as error:  # whatever happened, the client gets an answer
            answer = self._word(self._fault(error))
        await self._send(writer, answer)
        if refused:
            await self._drain(reader, writer)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn faults of a subclass into refusals, and log them.

        Without it, an OSError of its own would be taken for a client that is gone, and nobody would hear of it.
        """
        try:
            yield
        except RefusedError as refusal:
            if refusal.status >= 500 and refusal.status != HTTPStatus.SERVICE_UNAVAILABLE:
                self.log(f"answered {refusal.status}: {refusal}")
            raise
        except Exception as error:
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> RefusedError:
        """Log an unexpected failure, and say no more than that to the client."""
        self.log(f"a request failed: {type(error).__name__}")
        return RefusedError(500, "Something went wrong on the server.")

    def _word(self, refused: RefusedError) -> Answer:
        answer = self.refusal(refused.status, str(refused))
        if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return Answer(answer.body, answer.kind, answer.status, {**answer.headers, "Retry-After": "2"})
        return answer

    async def _head(self, reader: asyncio.StreamReader) -> Request:
        async with asyncio.timeout(self.patience.head):
            try:
                return parse_head(await reader.readuntil(b"\r\n\r\n"))
            except asyncio.LimitOverrunError:
                raise RefusedError(431, "The headers are too long.") from None

    async def _post(
        self,
        task: asyncio.Task[None],
        request: Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> Answer:
        with self._telling():
            work = self.post(request)
        length = length_of(request, self.limits.upload)
        self._check_places()  # before the body is read: who would be sent away need not send it
        if request.one("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        arrived = 0
        # An upload is bounded by `limits.upload`, and all of them together by `limits.arriving`.
        with _upload_file(self.limits.in_memory) as file:
            try:
                async with asyncio.timeout(self.patience.body):
                    while arrived < length:
                        async with asyncio.timeout(self.patience.idle):
                            data = await reader.read(min(length - arrived, _PIECE))
                        if not data:
                            raise RefusedError(400, "The upload ended early.")
                        arrived += len(data)
                        self._arrived += len(data)
                        if self._arrived > self.limits.arriving:
                            raise RefusedError(503, "Busy with other uploads: try again in a moment.")
                        with _on_disk():
                            file.write(data)
                self._check_places()
                with _on_disk():
                    file.seek(0)  # writes what is still in a buffer
                self._open[task] = "work"
                self._busy += 1
                try:
                    return await asyncio.get_running_loop().run_in_executor(
                        self._worker, self._begin, work, file
                    )
                finally:
                    self._busy -= 1
            except TimeoutError:
                raise RefusedError(408, "The upload took too long.") from None
            finally:
                self._arrived -= arrived

    def _check_places(self) -> None:
        if self._busy >= self.limits.waiting + self._at_once or self._unsent > self.limits.unsent:
            raise RefusedError(503, "Busy with other images: try again in a moment.")

    def _begin(self, work: Work, file: Any) -> Answer:
        if self._stop.is_set():
            raise RefusedError(503, "The server is being stopped.")
        with self._telling():
            return work(file)

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self._answered[answer.status] += 1
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        lines += [f"Content-Type: {answer.kind}", f"Content-Length: {len(answer.body)}", "Connection: close"]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        content = memoryview(answer.body)
        self._unsent += len(content)
        try:
            async with asyncio.timeout(self.patience.answer):
                # A piece at a time, because the writer copies what it is given.
                for start in range(0, len(content), _PIECE):
                    writer.write(content[start : start + _PIECE])
                    await writer.drain()
                await writer.drain()
        finally:
            self._unsent -= len(content)

    async def _drain(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read part of a refused upload, because closing the connection earlier would lose the answer."""
        writer.write_eof()
        async with asyncio.timeout(min(2.0, self.patience.idle)):
            for _ in range(2 * self.limits.upload // _PIECE):
                if not await reader.read(_PIECE):
                    return


@contextlib.contextmanager
def _upload_file(in_memory: int) -> Iterator[Any]:
    """A file for an upload, of which so many bytes stay in memory."""
    file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115
    try:
        yield file
    finally:
        # On a full disk, closing fails as well: it tries again to write. The client has been told by then.
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def _on_disk() -> Iterator[None]:
    """Refuse an upload that the disk cannot take."""
    try:
        yield
    except OSError:
        raise RefusedError(503, "There is no room for the upload on this machine's disk.") from None


def _connections(most: int) -> int:
    """Fewer connections where the process may not open that many files: a socket and a temporary file each."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return most
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if allowed == resource.RLIM_INFINITY else max(4, min(most, (allowed - _OVERHEAD) // 2))


# ---------------------------------------------------------------- heads

_LINE = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.[01]")
# Blanks around a value are taken off afterwards. With patterns for them here, a head of blanks would take days.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")


def parse_head(data: bytes) -> Request:
    r"""Read a request's first line and headers, strictly: no folded lines, no bare line ends, no control characters.

    >>> parse_head(b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n")
    Request(method='GET', path='/a', query={'b': 'c'}, headers=(('host', 'x'),))

    Raises:
        RefusedError: it is no such head.
    """
    first, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    begun = _LINE.fullmatch(first)
    if begun is None:
        raise RefusedError(400, "The request cannot be read.")
    if len(lines) > MAX_HEADERS:
        raise RefusedError(431, "There are too many headers.")
    fields = [_FIELD.fullmatch(line) for line in lines]
    if None in fields:
        raise RefusedError(400, "The headers cannot be read.")
    headers = tuple(
        (one[1].decode().lower(), one[2].strip(b" \t").decode("latin-1")) for one in fields if one is not None
    )
    try:
        address = urlsplit(begun[2].decode())
        pairs = parse_qsl(address.query, keep_blank_values=True, max_num_fields=MAX_HEADERS)
    except ValueError:
        raise RefusedError(400, "The address cannot be read.") from None
    query = dict(pairs)
    if len(query) < len(pairs):
        raise RefusedError(400, "The address gives the same name twice.")
    return Request(begun[1].decode(), address.path, query, headers)


def length_of(request: Request, most: int) -> int:
    """Return the length of a request's body in bytes.

    Raises:
        RefusedError: it is not stated, not clear, zero or more than `most`.
    """
    given = request.all("content-length")
    if not given or request.all("transfer-encoding"):
        raise RefusedError(411, "The length of the upload must be given (Content-Length).")
    text = given[0]
    if len(given) > 1 or not (text.isascii() and text.isdigit()):
        raise RefusedError(400, "Content-Length is no number.")
    if len(text) > 12 or int(text) > most:
        raise RefusedError(413, f"The image is larger than {most // 1_000_000} MB.")
    if int(text) == 0:
        raise RefusedError(400, "The upload is empty.")
    return int(text)
