"""Roboflow Inference through its own client, inference-sdk: detection, one request per class.

A Roboflow server offers no more of Moondream 2 than that. Encoding images and reading boxes is done here, and the wire
is left to the client.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from moondream_cv.backends import replies
from moondream_cv.backends.addresses import Address, find_key, shortened
from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.deadlines import Callers
from moondream_cv.backends.failures import Failure
from moondream_cv.backends.http import Http, Probe
from moondream_cv.backends.images import EncodedPicture
from moondream_cv.errors import MoondreamError
from moondream_cv.requests import Detect, DetectResult, Request, Result

DEFAULT_MODEL_ID = "moondream2/moondream2_2b_jul24"
_PATH = "/infer/lmm"
_RETRIED_BY_THE_CLIENT = frozenset({429, 503, 504})


class RoboflowInference(RemoteModel):
    """Moondream 2 on a Roboflow Inference server: boxes."""

    skills = frozenset({"detect"})

    def __init__(
        self,
        api_url: str = "http://localhost:9001",
        *,
        api_key: str | None = None,
        model_id: str = DEFAULT_MODEL_ID,
        has_scores: bool | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 8,
        image_format: str = "jpeg",
    ) -> None:
        """Open no connection yet.

        Args:
            api_url: The server.
            api_key: The key; None takes `ROBOFLOW_API_KEY`, or else `API_KEY`, and "" sends none.
            model_id: The model that the server shall use.
            has_scores: Whether the server's confidences are real; None asks its `/info` when that is needed.
            timeout: Seconds that a request may take, with the three quick tries of the client.
            retries: Tries after the first at the most, where the server fails. Where it is busy or cannot be reached,
                the client's own three tries are all.
            backoff: Seconds before the first retry, doubled with each.
            max_in_flight: Requests that wait for the server at a time.
            image_format: What images are encoded as that are not files already: "jpeg" or "png".

        Raises:
            MoondreamError: inference-sdk is not installed.
            ValueError: An argument is out of range.
        """
        _sdk()
        if not isinstance(model_id, str) or not model_id.strip():
            raise ValueError(f"model_id must be a name such as {DEFAULT_MODEL_ID!r}, not {model_id!r}")
        address, self._key = Address.of(api_url), find_key(api_key, "ROBOFLOW_API_KEY", "API_KEY")
        http = Http(
            address,
            secrets=(self._key,),
            key_advice="; pass api_key= or set ROBOFLOW_API_KEY",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_idle=1,
        )
        self.model_id = model_id
        self._callers = Callers()
        self._clients = threading.local()
        super().__init__(http, has_scores=has_scores, max_in_flight=max_in_flight, image_format=image_format)

    def close(self) -> None:
        """Close the connections; every later call raises."""
        super().close()
        self._callers.close()

    def _ask(self, request: Request, picture: EncodedPicture | None) -> Result:
        assert isinstance(request, Detect)
        assert picture is not None
        # The client sets no timeout and has no way to set one, so its call is waited for in another thread.
        call = partial(self._infer, picture.base64, request.object)
        reply = self._http.retried(_PATH, lambda: self._within(call))
        return self._read(_PATH, lambda: self._parsed(request, reply, picture.size))

    def _within(self, call: Any) -> dict[str, Any]:
        try:
            reply = self._callers.call(call, self._http.timeout)
        except TimeoutError:
            raise Failure(self._http.no_answer(), timed_out=True) from None
        if not isinstance(reply, dict):
            raise Failure(f"answered no JSON object but {replies.shown(reply)}")
        return reply

    def _infer(self, image: str, prompt: str) -> Any:
        from inference_sdk.http.errors import HTTPCallErrorError, HTTPClientError
        from requests.exceptions import ChunkedEncodingError

        try:
            return self._client().infer_lmm(inference_input=image, model_id=self.model_id, prompt=prompt)
        except Failure:  # of `LimitedAdapter`
            raise
        except HTTPCallErrorError as error:
            status = error.status_code
            failure = self._http.refusal(status, shortened(error.api_message or ""))
            raise Failure(str(failure), again=failure.again and status not in _RETRIED_BY_THE_CLIENT) from error
        except HTTPClientError as error:
            raise Failure(f"is not reachable ({shortened(str(error))}); is the server running?") from error
        except ChunkedEncodingError as error:
            raise Failure(f"broke off ({shortened(str(error))})", again=True) from error
        except Exception as error:  # the client checks little: rubbish makes it raise a KeyError, an AttributeError...
            reason = shortened(f"{type(error).__name__}: {error}")
            raise Failure(f"answered what inference-sdk cannot read ({reason})") from error

    def _client(self) -> Any:
        """The client of this thread: nothing says that one may be shared."""
        if not hasattr(self._clients, "client"):
            from moondream_cv.backends.sdk_session import limit_this_thread

            sdk = _sdk()
            limit_this_thread()
            client = sdk.InferenceHTTPClient(api_url=self._api_url(), api_key=self._key)
            # To Roboflow's hosts the client would send the key within the URL, which its libraries log.
            hosted = client.client_mode is sdk.http.entities.HTTPClientMode.V0
            transport = "header" if hosted else "legacy"
            client.configure(sdk.InferenceConfiguration(api_key_transport=transport))
            self._clients.client = client
        return self._clients.client

    def _api_url(self) -> str:
        auth = self._http.address.auth
        if auth is None:
            return self.url
        from urllib.parse import quote

        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{quote(auth[0], safe='')}:{quote(auth[1], safe='')}@{rest}"

    def _parsed(self, request: Detect, reply: dict[str, Any], size: tuple[int, int]) -> DetectResult:
        if "predictions" not in reply and "response" in reply:
            raise Failure(
                f"answered text, no boxes: {replies.shown(reply['response'])}; is {self.model_id} a Moondream 2?"
            )
        boxes = replies.centred_objects_of(reply, self.has_scores, size)
        return DetectResult(*replies.limited(boxes, request.settings.max_objects, reply.get("truncated"), sent=False))

    def _probe_scores(self) -> Probe:
        return self._http.probe("/info")

    def _says_scores(self, reply: dict[str, Any]) -> bool:
        return reply.get("has_scores") is True


def _sdk() -> Any:
    try:
        import inference_sdk
        import inference_sdk.http.entities
    except ImportError as error:
        raise MoondreamError(
            'RoboflowInference needs inference-sdk; pip install "moondream-cv[roboflow]"; '
            "where the server is this project's own, MoondreamAPI needs nothing"
        ) from error
    return inference_sdk
