"""The configuration: what is wrong is said in one sentence that names the field."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from missile.errors import MisuseError
from missile.serving.access import Access, Role
from missile.serving.config import ServingConfig, parse_config, read_config
from missile.serving.refusal import Reason, Refusal

TENANT = '[[tenant]]\nname = "a"\nmodel = "m:f"\nclass = "BE"\n'
LS = '[[tenant]]\nname = "a"\nmodel = "m:f"\nclass = "LS"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "is not valid TOML"),
        ("colour = 1", "colour: there is no such field"),
        (TENANT + "slo = 3", "tenant 'a': slo: there is no such field"),
        ('[[tenant]]\nname = "a"', "tenant 'a': model: Field required"),
        (LS, "tenant 'a': an LS tenant needs slo_ms"),
        (LS + "slo_ms = -1", "tenant 'a': slo_ms: .* greater than 0, not -1"),
        (LS + 'slo_ms = "3"', "tenant 'a': slo_ms: .* valid number, not '3'"),
        (LS + "slo_ms = 10\nbatch = {max = 4, delay_ms = 5}", "the SLO has no room"),
        (TENANT + "batch = {delay_ms = 5}", "no sense with batch.max = 1"),
        (TENANT + "batch = {max = 2}\nbatched = false", "needs a model with a batch axis"),
        (TENANT + "weight = 0", "tenant 'a': weight: .* greater than 0"),
        (TENANT + "quota = {queue = 0}", "tenant 'a': quota.queue"),
        (TENANT + 'residency = "disk"', "tenant 'a': residency: .*'device' or 'host'"),
        (
            TENANT + '[[tenant.input]]\nname = "x"\ndatatype = "BYTES"\nshape = []',
            "unknown datatype 'BYTES'; known: BOOL",
        ),
        (TENANT + TENANT, "two tenants are named 'a'"),
        (TENANT.replace('"a"', '"../a"'), "is not a name"),
        ("[server]\nhttp_port = 70000", "server.http_port: .* 65535"),
        ('[server]\npolicy = "temporal"', "policy 'temporal' can't serve; those that can are streams, priority"),
        ('[server]\npolicy = "missile:foo=1"', "has no option 'foo'; known: ls_share"),
        ('[server]\npolicy = "priority"\nls_share = 0.5', "Policy 'priority' has no option 'ls_share'"),
        (TENANT + "colors = []", "tenant 'a': colors"),
        (TENANT + "count_escapes = true", "count_escapes needs colors"),
        ("[server]\nswap_mib = -1", "server.swap_mib"),
        ('[server]\nhost = "0.0.0.0"', "not a loopback address, so tokens are required"),
        ('[server]\ntls_key = "k"', "tls_certificate and tls_key come together"),
        ('[server]\ntokens = [{role = "root", env = "X"}]', "server.tokens.0.role"),
        ('[server]\ntokens = [{role = "read"}]', "exactly one of sha256, env and file"),
        ('[server]\ntokens = [{role = "read", env = "X", tenants = ["b"]}]\n' + TENANT, "unknown tenant 'b'; known: a"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(MisuseError, match=message) as caught:
        parse_config(text, "serve.toml")
    assert str(caught.value).startswith("serve.toml")
    assert "\n" not in str(caught.value)


def test_a_whole_configuration() -> None:
    config = parse_config(LS + "slo_ms = 10\nbatch = {max = 4, delay_ms = 1.0}\n")
    tenant = config.tenants[0]
    assert (tenant.tenant_class, tenant.slo_ms, tenant.wait_ms) == ("LS", 10.0, 100.0)
    assert config.server.loopback
    assert config.server.shared_memory_on
    assert ServingConfig.model_validate(config.model_dump(by_alias=True)) == config


def test_the_documented_configuration_is_valid() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "serving.md").read_text()
    block = text.partition("```toml\n")[2].partition("```")[0]
    config = parse_config(block)
    assert config.server.policy_text == "partition:ls_share=0.25"
    assert config.tenants[1].colors == [0, 2, 5]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="can't be read"):
        read_config(tmp_path / "absent.toml")


def _access(text: str, folder: Path) -> Access:
    return Access.of(parse_config(text).server, folder)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "infer.token").write_text("file-token-0123456789\n")
    monkeypatch.setenv("READ_TOKEN", "environment-token-0123")
    admin = hashlib.sha256(b"hashed-token-0123456789").hexdigest()
    access = _access(
        f'{TENANT}[server]\ntokens = [{{role = "read", env = "READ_TOKEN"}}, {{role = "infer", file = "infer.token", '
        f'tenants = ["a"]}}, {{role = "admin", sha256 = "{admin}"}}]',
        tmp_path,
    )
    assert access.principal("Bearer environment-token-0123").role is Role.READ
    infer = access.principal("bearer file-token-0123456789")
    assert (infer.role, infer.sees("a"), infer.sees("b")) == (Role.INFER, True, False)
    assert access.principal("Bearer hashed-token-0123456789").role is Role.ADMIN
    for wrong in (None, "", "Bearer ", "Bearer nope", "Basic environment-token-0123"):
        with pytest.raises(Refusal) as caught:
            access.principal(wrong)
        assert caught.value.reason is Reason.UNAUTHENTICATED
    with pytest.raises(Refusal, match="role admin; yours has infer"):
        access.require(infer, Role.ADMIN)
    with pytest.raises(Refusal, match="not for this model"):
        access.require(infer, Role.INFER, "b")


def test_tokens_that_are_no_secret_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    for source in ('file = "short"', 'file = "absent"', 'env = "MISSILE_TEST_UNSET"'):
        with pytest.raises(MisuseError, match=r"server\.tokens number 1"):
            _access(f'[server]\ntokens = [{{role = "read", {source}}}]', tmp_path)
