"""The demo, with fewer methods: a report, results and a certificate that verifies, and the numbers it is there to show."""

from __future__ import annotations

from expunge.benchmarks import demo
from expunge.records.certificate import verify


def test_the_quick_demo(tmp_path):
    found = demo.run(tmp_path, quick=True)
    assert set(found) == {"memorised", "class"}
    for name, comparison in found.items():
        gaps = {r.method.name: r.find("average_gap") for r in comparison.results}
        assert gaps["retrain"].unlearned < 3 < gaps["retrain"].original, name
    page = (tmp_path / "report.html").read_text()
    assert "digits-memorised" in page and "digits-class" in page and len(page) < 2_000_000
    certificate = next((tmp_path / "memorised").glob("*/certificate.json"))
    assert verify(certificate, weights=certificate.parent / "model").signature_valid
    assert (tmp_path / "certificate.json").exists()
