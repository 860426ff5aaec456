"""A browser gets the report from the store through the engine and the gateway."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import Store, open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from services.engine import model_report
from services.engine.model_report import read_report
from tests.support.engine_models import BYTES, tiny_model
from tests.support.scripted_engine import ScriptedEngine, http_client, running_engine, running_gateway, until_ready
from tests.support.service_process import EngineProcess

PNG = b"\x89PNG\r\n\x1a\n and so on"


def write(store: Store, **files: bytes) -> None:
    names = {"report.md": b"# A report", "loss.png": PNG, "report.json": b'{"revision": "sft/step_000001"}'}
    for name, content in (names | files).items():
        store.write(f"reports/tiny/{name}", content)


def test_the_page_and_its_pictures_are_handed_out_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write(
        store, **{"secret.txt": b"x", "page.html": b"x", "decisions/sft_step_000001.json": b"{}", "deep/er.png": b"x"}
    )
    report = read_report(store, "tiny")
    assert (report.model, report.revision) == ("tiny", "sft/step_000001")
    files = {file.name: (file.media_type, file.content) for file in report.files}
    assert files == {"report.md": ("text/markdown", b"# A report"), "loss.png": ("image/png", PNG)}


def test_one_file_comes_with_the_names_of_the_others(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write(store)
    files = {file.name: file.content for file in read_report(store, "tiny", "loss.png").files}
    assert files == {"report.md": b"", "loss.png": PNG}


@pytest.mark.parametrize("file", ["report.json", "../tiny/report.md", "decisions/x.md", "none.png", "."])
def test_a_file_that_the_report_does_not_have_is_not_found(tmp_path: Path, file: str) -> None:
    store = open_store(str(tmp_path))
    write(store)
    with pytest.raises(FileNotFoundError):
        read_report(store, "tiny", file)


def test_a_report_that_is_too_large_is_not_sent_at_once_but_its_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    write(store, **{"large.png": bytes(2000)})
    monkeypatch.setattr(model_report, "MAX_BYTES", 1000)
    assert read_report(store, "tiny", "report.md").files
    for file in ("", "large.png"):
        with pytest.raises(UserError, match=r"2,0\d\d bytes|2,000 bytes"):
            read_report(store, "tiny", file)


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b'{"revision": 3}'])
def test_a_report_that_does_not_say_what_it_is_about_is_shown_all_the_same(tmp_path: Path, content: bytes) -> None:
    store = open_store(str(tmp_path))
    write(store, **{"report.json": content})
    assert read_report(store, "tiny").revision == ""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[EngineProcess]:
    store = open_store(str(tmp_path))
    ref = CheckpointRef("tiny", "sft", 2)
    save_checkpoint(store, ref, model=tiny_model(), tokenizer=BYTES, meta={})
    promote(store, ref)
    running = EngineProcess(tmp_path)
    try:
        yield running
        assert running.stop() == 0
    finally:
        running.process.kill()
        running.stop()


async def test_the_report_of_the_store_reaches_the_browser(service: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as missing:
        await asyncio.to_thread(service.stub.GetReport, pb.GetReportRequest())
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    async with running_gateway(service.address) as url, http_client(url) as http:
        await until_ready(url)
        answer = await http.get("/report/report.md")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "report_not_found")
        assert "the store has no report on tiny" in answer.json()["error"]["message"]
        write(open_store(str(tmp_path)))
        page = await http.get("/report/report.md")
        assert (page.status_code, page.text) == (200, "# A report")
        assert page.headers["content-type"] == "text/markdown; charset=utf-8"
        assert page.headers["nanochat-report-revision"] == "sft/step_000001"
        assert page.headers["nanochat-served-revision"] == "sft/step_000002"
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert page.headers["x-content-type-options"] == "nosniff"
        picture = await http.get("/report/loss.png?model=tiny")
        assert (picture.content, picture.headers["content-type"]) == (PNG, "image/png")
        for path in (
            "report.json",
            "none.png",
            "..%2F..%2Fmodels%2Ftiny%2FPROMOTED",
            "%2e%2e/x.png",
            "report.md%00.png",
        ):
            assert (await http.get(f"/report/{path}")).status_code == 404, path
        long = (await http.get(f"/report/{'x' * 1000}.png")).json()["error"]
        assert long["code"] == "report_not_found"
        assert 50 < long["message"].count("x") <= 100
        assert (await http.get("/report/report.md?model=other")).status_code == 404


async def test_a_browser_gets_no_other_kind_of_file_whatever_the_engine_calls_it() -> None:
    files = [
        pb.ReportFile(name="page.html", media_type="text/html", content=b"<script>"),
        pb.ReportFile(name="report.md", media_type="text/markdown", content=b"# Here"),
    ]

    class Reporting(ScriptedEngine):
        async def GetReport(self, _request: Any, _context: Any) -> pb.Report:
            return pb.Report(model="nano", files=files)

    async with running_engine() as engine, running_gateway(engine.address) as url, http_client(url) as http:
        await until_ready(url)
        assert (await http.get("/report/report.md")).status_code == 404, "an engine that knows no reports"
    reporting = Reporting()
    await reporting.start()
    async with running_gateway(reporting.address) as url, http_client(url) as http:
        await until_ready(url)
        assert (await http.get("/report/page.html")).status_code == 404
        assert (await http.get(f"/report/{'x' * 1000}")).json()["error"]["message"].count("x") == 100
        assert (await http.get("/report/report.md")).text == "# Here"
    await reporting.stop()


async def test_the_page_is_that_of_the_build_or_says_that_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<title>Report</title>")
    async with running_engine() as engine, running_gateway(engine.address, static=tmp_path) as url:
        async with http_client(url) as http:
            page = await http.get("/report")
            assert (page.text, page.headers["content-type"]) == ("<title>Report</title>", "text/html; charset=utf-8")
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
        async with running_gateway(engine.address) as bare, http_client(bare) as http:
            answer = await http.get("/report")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_built")
