"""Client for Roboflow Inference, on top of inference-sdk: detection, one request per class.

Roboflow servers offer only detection of Moondream 2. inference-sdk implements the transport; images are encoded and
responses parsed here.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from moondream_cv._inherited_options import inherit_options
from moondream_cv.backends import responses
from moondream_cv.backends.base import RemoteModel, RemoteOptions
from moondream_cv.backends.call_timeout import TimeoutExecutor
from moondream_cv.backends.credentials import shorten
from moondream_cv.backends.http import Probe
from moondream_cv.backends.images import EncodedImage
from moondream_cv.backends.retries import AttemptError
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import MoondreamError
from moondream_cv.requests import Detect, DetectResult, Request, Result

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_MODEL_ID = "moondream2/moondream2_2b_jul24"
_PATH = "/infer/lmm"
_RETRIED_BY_SDK = frozenset({429, 503, 504})


@inherit_options
class RoboflowInference(RemoteModel):
    """Moondream 2 on a Roboflow Inference server: detect.

    The API key is read from `ROBOFLOW_API_KEY` or `API_KEY`. inference-sdk makes three quick attempts for each request,
    which count as one attempt of `retries` and share one `timeout`; `retries` applies to server errors only.
    """

    skills = frozenset({"detect"})

    _key_variables = ("ROBOFLOW_API_KEY", "API_KEY")
    _key_header = None  # inference-sdk sends the key itself
    _reuses_connections = False  # inference-sdk has its own

    def __init__(
        self,
        api_url: str = "http://localhost:9001",
        *,
        model_id: str = DEFAULT_MODEL_ID,
        **options: Unpack[RemoteOptions],
    ) -> None:
        """Create a client for a server. The first request opens the connection.

        Args:
            api_url: URL of the server.
            model_id: Model that the server should use.

        Raises:
            MoondreamError: inference-sdk is not installed.
            ValueError: An argument is out of range.
        """
        _import_sdk()
        if not isinstance(model_id, str) or not model_id.strip():
            raise ValueError(f"model_id must be a name such as {DEFAULT_MODEL_ID!r}, got {model_id!r:.100}")
        self.model_id = model_id
        self._executor = TimeoutExecutor()
        self._clients = threading.local()
        super().__init__(ServerURL.parse(api_url), **options)

    def close(self) -> None:
        """Close the connections and cancel waiting requests. Later calls raise."""
        super().close()
        self._executor.close()

    def _send_request(self, request: Request, image: EncodedImage | None) -> Result:
        assert isinstance(request, Detect)
        assert image is not None
        # inference-sdk has no timeout, so its call runs in another thread.
        call = partial(self._infer, image.base64, request.object)
        body = self._http.with_retries(_PATH, lambda: self._call_with_timeout(call))
        return self._parse(_PATH, lambda: self._parse_result(request, body, image.size))

    def _call_with_timeout(self, call: Any) -> dict[str, Any]:
        try:
            body = self._executor.call(call, self._http.timeout)
        except TimeoutError:
            raise AttemptError(self._http.timeout_message(), timed_out=True) from None
        if not isinstance(body, dict):
            raise AttemptError(f"returned no JSON object: {responses.excerpt(body)}")
        return body

    def _infer(self, image: str, prompt: str) -> Any:
        """Call inference-sdk, and convert its errors.

        Raises:
            AttemptError: The call failed.
        """
        from inference_sdk.http.errors import HTTPCallErrorError, HTTPClientError
        from requests.exceptions import ChunkedEncodingError

        try:
            return self._client().infer_lmm(inference_input=image, model_id=self.model_id, prompt=prompt)
        except AttemptError:  # raised by `LimitedAdapter`
            raise
        except HTTPCallErrorError as error:
            status = error.status_code
            failure = self._http.status_error(status, shorten(error.api_message or ""))
            raise AttemptError(str(failure), failure.retryable and status not in _RETRIED_BY_SDK) from error
        except HTTPClientError as error:
            raise AttemptError(f"is unreachable ({shorten(str(error))}); check that the server is running") from error
        except ChunkedEncodingError as error:
            raise AttemptError(f"closed the connection early ({shorten(str(error))})", retryable=True) from error
        except Exception as error:  # inference-sdk checks little: an invalid response may raise KeyError, ...
            reason = shorten(f"{type(error).__name__}: {error}")
            raise AttemptError(f"returned a response that inference-sdk cannot parse ({reason})") from error

    def _client(self) -> Any:
        """Return the client of this thread: inference-sdk does not document that clients are thread-safe."""
        if not hasattr(self._clients, "client"):
            from moondream_cv.backends.limited_session import limit_current_thread

            sdk = _import_sdk()
            limit_current_thread()
            client = sdk.InferenceHTTPClient(api_url=self._url_with_auth(), api_key=self._api_key)
            # For Roboflow's hosts the client would send the key in the URL, which its libraries log.
            hosted = client.client_mode is sdk.http.entities.HTTPClientMode.V0
            transport = "header" if hosted else "legacy"
            client.configure(sdk.InferenceConfiguration(api_key_transport=transport))
            self._clients.client = client
        return self._clients.client

    def _url_with_auth(self) -> str:
        auth = self._http.server.auth
        if auth is None:
            return self.url
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{quote(auth[0], safe='')}:{quote(auth[1], safe='')}@{rest}"

    def _parse_result(self, request: Detect, body: dict[str, Any], size: tuple[int, int]) -> DetectResult:
        if "predictions" not in body and "response" in body:
            raise AttemptError(
                f"returned text instead of boxes: {responses.excerpt(body['response'])}; check that {self.model_id} is "
                "a Moondream 2 model"
            )
        boxes = responses.parse_predictions(body, self.has_scores, size)
        limit, flag = request.settings.max_objects, body.get("truncated")
        return DetectResult(*responses.truncate(boxes, limit, flag, limit_sent=False))

    def _probe_server(self) -> Probe:
        return self._http.probe("/info")

    def _reports_scores(self, body: dict[str, Any]) -> bool:
        return body.get("has_scores") is True


def _import_sdk() -> Any:
    try:
        import inference_sdk
        import inference_sdk.http.entities
    except ImportError as error:
        raise MoondreamError(
            'RoboflowInference needs inference-sdk; pip install "moondream-cv[roboflow]"; '
            "for moondream-cv serve use MoondreamAPI, which needs no extra package"
        ) from error
    return inference_sdk
