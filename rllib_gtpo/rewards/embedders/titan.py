"""Amazon Titan Text Embeddings V2 on Bedrock: what the paper compares code with.

Every text costs money, and its code leaves the machine.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rllib_gtpo.encodable import encodable
from rllib_gtpo.errors import ConfigError, EmbedderError
from rllib_gtpo.rewards.embedders.base import check_positive, unit_vector

_DIMENSIONS = (1024, 512, 256)
_MAX_CHARACTERS = 50_000  # of one request; it also has a limit of 8,192 tokens
_SHORT = 1_000  # characters that cannot be too many tokens
_TOO_LONG = re.compile(r"too many input tokens|maxlength|too long", re.IGNORECASE)
_MAX_WAIT_S = 20.0
_TRANSIENT_STATUS = (408, 424, 429)  # and 500 or more: model timed out, model failed, throttled
_RENEW = (
    "renew the AWS credentials (aws sso login, or a new session token) on every machine with env "
    "runners, and resume the run"
)
_REMEDIES = {
    "ExpiredTokenException": _RENEW,
    "ExpiredToken": _RENEW,
    "UnrecognizedClientException": "check the AWS keys and the session token, or " + _RENEW,
    "InvalidSignatureException": "check the AWS secret key and the machine's clock",
    "AccessDeniedException": "allow bedrock:InvokeModel for this model to the role or user, and "
    "enable the model in the Bedrock console (Model access) of this region",
    "ResourceNotFoundException": "use a region that offers the model",
    "ServiceQuotaExceededException": "ask AWS for a higher quota, or lower concurrency",
    "ValidationException": "check model and dimensions",
}


class _TooLongError(Exception):
    """The service says that a text has too many tokens."""


@dataclass(frozen=True)
class Titan:
    """Embeds through the Bedrock runtime, several texts at once.

    A text above the service's limits is cut into equal pieces whose vectors are averaged.

    model: The model's id, or the ARN of an inference profile.
    dimensions: 1024, 512 or 256.
    region, profile, endpoint_url: As in boto3; None takes what AWS's own settings say.
    concurrency: Requests in flight, of each env runner.
    attempts: Most tries of one request.  Throttling, timeouts and faults of the service are tried
        again, after a random wait whose limit doubles up to 20 s; refusals are not.
    timeout_s: For one answer.
    """

    model: str = "amazon.titan-embed-text-v2:0"
    dimensions: int = 1024
    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    concurrency: int = 16
    attempts: int = 6
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if self.dimensions not in _DIMENSIONS:
            raise ConfigError(
                f"embedder 'titan': dimensions={self.dimensions!r} must be one of "
                f"{', '.join(map(str, _DIMENSIONS))}."
            )
        check_positive("titan", concurrency=self.concurrency, attempts=self.attempts)
        if not isinstance(self.timeout_s, (int, float)) or not self.timeout_s > 0:
            raise ConfigError(f"embedder 'titan': timeout_s={self.timeout_s!r} must be above 0.")

    @property
    def identity(self) -> str:
        """See Embedder."""
        return f"titan {self.model} dimensions={self.dimensions} pieces<={_MAX_CHARACTERS}"

    def embed(self, texts: Sequence[str]) -> list[np.ndarray | Exception]:
        """See Embedder.

        Raises:
            ConfigError: There is no such profile, no region, or the endpoint is not an address.
        """
        _ = self._client  # made here, since making one is not safe in threads
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._result, texts))

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        settings = Config(
            read_timeout=self.timeout_s,
            connect_timeout=self.timeout_s,
            max_pool_connections=self.concurrency,
            # Ours counts for each text; botocore's shares one quota, and lets model timeouts pass.
            retries={"total_max_attempts": 1},
        )
        try:
            session = boto3.Session(profile_name=self.profile, region_name=self.region)
            return session.client(
                "bedrock-runtime", endpoint_url=self.endpoint_url, config=settings
            )
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"embedder 'titan': {error}  Set its region, profile or endpoint_url, such as "
                "embedder={'name': 'titan', 'region': 'us-east-1'}."
            ) from error

    def _result(self, text: str) -> np.ndarray | Exception:
        try:
            return self._vector(encodable(text))
        except EmbedderError as error:
            return error
        except Exception as error:  # whatever it is, it is this text's alone
            return EmbedderError(f"titan: {error!r}")

    def _vector(self, text: str) -> np.ndarray:
        pieces = -(-len(text) // _MAX_CHARACTERS)
        while True:
            size = -(-len(text) // pieces)
            try:
                vectors = [
                    self._invoke(text[start : start + size]) for start in range(0, len(text), size)
                ]
            except _TooLongError as error:
                if size <= _SHORT:
                    raise EmbedderError(f"titan: {size} characters are refused: {error}") from error
                pieces *= 2
                continue
            return unit_vector(np.mean(vectors, axis=0), self.dimensions)

    def _invoke(self, text: str) -> np.ndarray:
        from botocore import exceptions as aws

        request = {"inputText": text, "dimensions": self.dimensions, "normalize": True}
        last: Exception | None = None
        for attempt in range(self.attempts):
            if attempt:
                limit = min(_MAX_WAIT_S, 2.0 ** (attempt - 1))
                time.sleep(random.SystemRandom().uniform(0.0, limit))
            try:
                response = self._client.invoke_model(
                    modelId=self.model,
                    body=json.dumps(request),
                    contentType="application/json",
                    accept="application/json",
                )
                return self._parse(response["body"].read())
            except aws.ClientError as error:
                if not _transient(error):
                    raise _refusal(error) from error
                last = error
            except (
                aws.HTTPClientError,  # timeouts and lost connections
                aws.ConnectionError,
                aws.IncompleteReadError,
            ) as error:
                last = error
            except aws.BotoCoreError as error:
                raise EmbedderError(
                    f"titan: {error}: give AWS credentials to every machine with env runners "
                    "(a role, a profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
                ) from error
        raise EmbedderError(
            f"titan: given up after {self.attempts} attempts: {last}  If it is throttled, lower "
            "concurrency or raise attempts; if it cannot be reached, check region, endpoint_url "
            "and network."
        ) from last

    def _parse(self, body: bytes) -> np.ndarray:
        try:
            values = json.loads(body)["embedding"]
            return unit_vector(values, self.dimensions)
        except (ValueError, KeyError, TypeError, EmbedderError) as error:
            raise EmbedderError(
                f"titan: the answer is not an embedding of {self.dimensions} numbers ({error!r}): "
                f"{body[:80]!r}"
            ) from error


def _transient(error: Any) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    return status >= 500 or status in _TRANSIENT_STATUS or "Throttl" in code


def _refusal(error: Any) -> Exception:
    code = error.response.get("Error", {}).get("Code", "")
    if code == "ValidationException" and _TOO_LONG.search(str(error)):
        return _TooLongError(str(error))
    remedy = _REMEDIES.get(code, "see the message")
    return EmbedderError(f"titan: {error}: {remedy}.")
