"""Who may do what: tokens, their roles and the tenants they are good for."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from missile.errors import MisuseError
from missile.serving.config import ServerConfig, Token
from missile.serving.refusal import Reason, Refusal

__all__ = ["Access", "Principal", "Role"]


class Role(IntEnum):
    """Each includes those before it."""

    READ = 1
    INFER = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. key: tells apart what belongs to whom (shared memory regions). tenants: empty means all."""

    key: str
    role: Role
    tenants: frozenset[str] = frozenset()

    def sees(self, tenant: str) -> bool:
        return not self.tenants or tenant in self.tenants


_LOCAL = Principal("", Role.ADMIN)


class Access:
    """Checks tokens. Without any (loopback only), everybody who can connect may do everything."""

    def __init__(self, tokens: Sequence[tuple[bytes, Principal]]) -> None:
        self._tokens = tuple(tokens)

    @classmethod
    def of(cls, server: ServerConfig, folder: Path) -> Access:
        """Read the tokens that `server` names. MisuseError when one is missing or too short to be a secret."""
        return cls([_known(index, token, folder) for index, token in enumerate(server.tokens)])

    def principal(self, authorization: str | None) -> Principal:
        """From the value of the `authorization` header. UNAUTHENTICATED without a valid token where one is needed."""
        if not self._tokens:
            return _LOCAL
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Refusal(Reason.UNAUTHENTICATED, "This server wants a token: Authorization: Bearer TOKEN.")
        digest = hashlib.sha256(secret.strip().encode()).digest()
        found: Principal | None = None
        for known, principal in self._tokens:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise Refusal(Reason.UNAUTHENTICATED, "The token is not valid.")
        return found

    @staticmethod
    def require(principal: Principal, role: Role, tenant: str | None = None) -> None:
        """FORBIDDEN when the token's role is too low, or when it is for other tenants."""
        if principal.role < role:
            raise Refusal(
                Reason.FORBIDDEN,
                f"This needs a token with the role {role.name.lower()}; yours has {principal.role.name.lower()}.",
            )
        if tenant is not None and not principal.sees(tenant):
            raise Refusal(Reason.FORBIDDEN, "The token is not for this model.")


def _known(index: int, token: Token, folder: Path) -> tuple[bytes, Principal]:
    where = f"server.tokens number {index + 1}"
    if token.sha256 is not None:
        digest = bytes.fromhex(token.sha256)
    else:
        secret = ""
        if token.env is not None:
            secret = os.environ.get(token.env, "").strip()
            where += f" (environment variable {token.env})"
        elif token.file is not None:
            where += f" (file {token.file})"
            try:
                secret = (folder / token.file).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise MisuseError(f"{where} can't be read: {error}.") from error
        if len(secret) < 16:
            raise MisuseError(f"{where} must hold at least 16 characters.")
        digest = hashlib.sha256(secret.encode()).digest()
    return digest, Principal(digest.hex()[:16], Role[token.role.upper()], frozenset(token.tenants))
