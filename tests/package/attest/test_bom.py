"""The bill of materials is one by the official schema, and names every file by its hash."""

import hashlib
import json

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "full", "alone"])
def test_a_bill_of_materials_keeps_to_the_schema_and_names_the_files(form, request) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    package = request.getfixturevalue(form).directory
    text = (package / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    listed = {item["name"]: item["hashes"][0]["content"] for item in bom["components"]}
    for path in package.glob("*.safetensors"):
        assert listed[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    model = bom["metadata"]["component"]
    assert model["pedigree"]["ancestors"][0]["name"] == ("owner/tiny" if form == "alone" else "base")
    said = {item["name"]: item["value"] for item in model["modelCard"]["properties"]}
    assert said["finetune:steps"] == "6" and said["finetune:optimizer.learning_rate"] == "0.01"
    assert ("finetune:adapter.rank" in said) == (form != "full")
    assert model["modelCard"]["considerations"]["technicalLimitations"][0].startswith("Checked is that")
    assert {metric["type"] for metric in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]} == {
        "cross-entropy, nats per token",
        "perplexity",
    }
