"""Download of images by URL."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from moondream_cv.detector import Detector
from moondream_cv.downloads import download_image
from moondream_cv.errors import ImageError
from moondream_cv.images import to_rgb
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.remote_server import RemoteServer, Reply, remote_server


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(color_frame(("red", (10, 5, 30, 45)))[..., ::-1]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        running.on("/a.png", Reply(png(), kind="image/png"))
        yield running


def test_image_url_with_a_private_address_is_downloaded(server: RemoteServer) -> None:
    pixels = to_rgb(f"{server.url}/a.png")
    assert pixels.shape == (60, 80, 3)
    assert (pixels[25, 20] == (255, 0, 0)).all()
    assert len(server.requests) == 1
    assert server.requests[0].headers["user-agent"].startswith("moondream-cv/")


def test_detector_accepts_an_image_url(server: RemoteServer) -> None:
    (found,) = Detector(ColorModel())([f"{server.url}/a.png"], "red")
    np.testing.assert_array_equal(found.xyxy, [[10, 5, 30, 45]])


def test_redirects_are_followed(server: RemoteServer) -> None:
    server.on("/moved", Reply(b"", 302, {"Location": f"{server.url}/a.png"}))
    assert download_image(f"{server.url}/moved") == png()


def test_user_and_password_are_sent_and_redacted(server: RemoteServer) -> None:
    server.on("/private.png", Reply(b"no", 403))
    url = server.url.replace("http://", "http://me:secret-word@") + "/private.png?token=secret-token"
    with pytest.raises(ImageError, match=rf"^'{re.escape(server.url)}/private\.png': .* status 403") as caught:
        to_rgb(url)
    assert "secret" not in str(caught.value)
    assert server.requests[0].headers["authorization"].startswith("Basic ")
    assert server.requests[0].path.endswith("?token=secret-token")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Reply({"error": "gone"}, 404), "returned status 404; check the URL"),
        (Reply(b"", kind="image/png"), "is empty: the server sent no data"),
        (Reply(b"<html>log in</html>", kind="text/html"), "is not an image in a supported format"),
        (Reply(png()[:-40], kind="image/png"), "is truncated or damaged"),
        (Reply(fault="reset"), "cannot be downloaded"),
        (Reply(png(), fault="cut"), "cannot be downloaded"),
    ],
    ids=["missing", "empty", "page", "truncated", "reset", "cut"],
)
def test_failed_downloads_name_the_url(server: RemoteServer, answer: Reply, message: str) -> None:
    server.on("/bad.png", answer)
    with pytest.raises(ImageError, match=rf"{re.escape(server.url)}/bad\.png.*{message}"):
        to_rgb(f"{server.url}/bad.png")


def test_endless_redirects_raise(server: RemoteServer) -> None:
    server.on("/round", Reply(b"", 302, {"Location": f"{server.url}/round"}))
    with pytest.raises(ImageError, match="redirects more than 5 times"):
        download_image(f"{server.url}/round")


def test_size_is_limited(server: RemoteServer) -> None:
    assert download_image(f"{server.url}/a.png", max_bytes=len(png())) == png()
    with pytest.raises(ImageError, match="larger than"):
        download_image(f"{server.url}/a.png", max_bytes=len(png()) - 1)


def test_time_is_limited(server: RemoteServer) -> None:
    server.on("/never.png", Reply(fault="hang"))
    with pytest.raises(ImageError, match="did not respond in time"):
        download_image(f"{server.url}/never.png", max_seconds=0.2)


def test_unreachable_host_raises() -> None:
    with pytest.raises(ImageError, match=r"^'http://127\.0\.0\.1:9/a\.png' cannot be downloaded: .*Connection refused"):
        to_rgb("http://127.0.0.1:9/a.png")
