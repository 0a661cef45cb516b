"""A tiny server on the loopback interface that shows the pages from fixture views, as the arena does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from page_views import VIEWS, compare, run
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from offbook.arena import pages
from offbook.service.pages import CONTENT_SECURITY_POLICY, static_files

FRAMES = 100


def write_film(path: Path, frames: int = FRAMES, rate: int = 30) -> None:
    """A film whose grey says the number of its frame: 20 + 2 k."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as film:
        stream = film.add_stream("libx264", rate=rate, options={"crf": "10", "g": "10"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 2 * k, np.uint8))
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


class Stage:
    """What the server shows now: views by page key, and whether the live stream is up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.views: dict[str, Callable[[], dict[str, Any]]] = {key: view for key, (_, view) in VIEWS.items()}
        film = {"url": "/film.mp4", "poster": "/poster.png"}
        self.views["run"] = lambda: run([{"camera": "front"} | film, {"camera": "wrist"} | film], steps=FRAMES)
        self.views["compare"] = lambda: compare({"a": film, "b": {"url": "/short.mp4", "poster": None}})
        self.live = True
        self.closed = False
        self.told = 0

    def tell(self) -> None:
        self.told += 1

    async def page(self, request: Request) -> Response:
        key = request.path_params["key"]
        text = pages.render(VIEWS[key][0], self.views[key](), query=dict(request.query_params))
        return HTMLResponse(text, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    async def events(self, request: Request) -> Response:
        if not self.live:
            return Response(status_code=503)
        heard = self.told

        async def lines() -> AsyncIterator[str]:
            nonlocal heard
            yield ": hello\n\n"
            while self.live and not self.closed:
                if heard < self.told:
                    heard = self.told
                    yield 'data: {"kind": "done"}\n\n'
                await asyncio.sleep(0.05)

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def file(self, request: Request) -> Response:
        return FileResponse(self.folder / request.url.path.lstrip("/"))


@contextmanager
def served(folder: Path) -> Iterator[Stage]:
    write_film(folder / "film.mp4")
    write_film(folder / "short.mp4", FRAMES // 2)
    poster = BytesIO()
    Image.new("RGB", (64, 64), (40, 90, 160)).save(poster, "PNG")
    (folder / "poster.png").write_bytes(poster.getvalue())
    stage = Stage(folder)
    files = [Route(f"/{name}", stage.file) for name in ("film.mp4", "short.mp4", "poster.png")]
    app = Starlette(
        routes=[
            Route("/show/{key}", stage.page),
            Route("/v1/events", stage.events),
            Mount("/static", static_files("offbook.arena.pages")),
            *files,
        ]
    )
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run)
    started = threading.Event()
    startup = server.startup

    async def startup_and_say(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = startup_and_say  # type: ignore[method-assign]
    thread.start()
    try:
        assert started.wait(20)
        stage.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/show/"
        yield stage
    finally:
        stage.closed = True
        server.should_exit = True
        thread.join(20)
