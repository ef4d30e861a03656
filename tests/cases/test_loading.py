"""Data and models from files: what is read equals what was written, and what could run code is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from expunge import Case, requests
from expunge.cases import as_data
from expunge.cases.loading import load_data, load_model, load_weights
from expunge.errors import BadData, BadModel
from toys import mlp

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 2, 1])


def small(outputs: int = 3) -> nn.Module:
    """Found by its name in these tests."""
    return nn.Linear(3, outputs)


# -- data --------------------------------------------------------------------------------------------------------------
def test_npz_and_its_usual_names(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y, group=Y)
    data = load_data(tmp_path / "a.npz")
    assert data.names == ["inputs", "labels", "group"] and torch.equal(data.column("inputs"), torch.from_numpy(X))
    assert as_data(tmp_path / "a.npz").fingerprint() == data.fingerprint()
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(BadData, match=r"readable \.npz"):
        load_data(tmp_path / "b.npz")
    with pytest.raises(BadData, match="Did you mean 'group'"):
        load_data(tmp_path / "a.npz", labels="grup")


def test_csv_numbers_become_one_inputs_column(tmp_path):
    (tmp_path / "a.csv").write_text("height,weight,target\n1,2.5,0\n3,4.5,1\n")
    data = load_data(tmp_path / "a.csv")
    assert data.column("inputs").tolist() == [[1.0, 2.5], [3.0, 4.5]] and data.column("labels").tolist() == [0, 1]
    assert data.column("labels").dtype == torch.int64 and data.column("height").tolist() == [1, 3]
    regression = load_data(tmp_path / "a.csv", labels="weight")
    assert regression.column("labels").tolist() == [2.5, 4.5] and regression.column("inputs").tolist() == [
        [1, 0],
        [3, 1],
    ]


def test_text_columns_stay_for_requests(tmp_path):
    lines = [{"x": [0.5 * i, 1.0], "label": "cat" if i % 2 else "dog", "city": f"c{i % 3}"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_data(tmp_path / "a.jsonl")
    assert data.column("labels").tolist() == [1, 0, 1, 0, 1, 0] and data.column("label_names")[0] == "dog"
    assert requests.where("city", "==", "c1").rows(data).tolist() == [1, 4]
    case = Case(nn.Linear(2, 2), data, requests.where("city", "==", "c1"))
    assert len(case.split("forget")) == 2 and case.data.fetch(torch.tensor([2]))["inputs"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\n1\n", "a,b\n1,2,3\n"])
def test_broken_tables_are_refused(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadData):
        load_data(tmp_path / "a.csv")


def test_an_empty_cell_is_nan_and_is_found(tmp_path):
    (tmp_path / "a.csv").write_text("x1,x2,label\n1,2,0\n,4,1\n5,6,1\n")
    with pytest.raises(BadData, match=r"NaN or infinity in 1 rows \(first: \[1\]\)"):
        Case(nn.Linear(2, 2), load_data(tmp_path / "a.csv"), requests.samples([0]))


def test_parquet_numbers_pictures_and_a_folder_of_expunge_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()}).to_parquet(tmp_path / "n.parquet")
    assert torch.equal(load_data(tmp_path / "n.parquet").column("inputs"), torch.from_numpy(X))
    pictures = [Image.fromarray(np.full((4, 4, 3), 50 * i, np.uint8)) for i in range(4)]
    folder = tmp_path / "home" / "pets" / "plain_text"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_dict({"img": pictures, "label": Y.tolist()})
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    table.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path / "home"))
    data = load_data("someone/pets").load()
    assert data.column("inputs").shape == (4, 3, 4, 4) and torch.allclose(
        data.column("inputs")[3], torch.tensor(150 / 255)
    )
    assert data.column("labels").tolist() == Y.tolist() and len(load_data("pets", split="test")) == 1
    table.save_to_disk(tmp_path / "saved")
    assert load_data(tmp_path / "saved").load().fingerprint() == data.fingerprint()
    with pytest.raises(BadData, match="split 'dev'"):
        load_data("pets", split="dev")


def test_what_is_not_there_and_what_is_never_read(tmp_path):
    with pytest.raises(BadData, match="EXPUNGE_DATA"):
        load_data("no-such-data-set")
    with pytest.raises(BadData, match="check the path"):
        load_data(tmp_path / "none.csv")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(BadData, match="never reads"):
        load_data(tmp_path / "a.pkl")
    with pytest.raises(BadData, match="found none"):
        load_data(tmp_path)


# -- models ------------------------------------------------------------------------------------------------------------
def test_a_function_with_weights(tmp_path):
    weights = {k: v + 1 for k, v in small().state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = load_model(f"{__file__}:small", weights=tmp_path / "w.safetensors")
    assert torch.equal(model.weight, weights["weight"])
    spec = {"function": f"{__file__}:small", "weights": str(tmp_path / "w.safetensors"), "arguments": {"outputs": 3}}
    assert torch.equal(load_model(spec).bias, weights["bias"])
    assert load_model(model) is model and load_model("torch.nn:Linear", in_features=2, out_features=5).weight.shape == (
        5,
        2,
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torch.nn:Liner", "Did you mean 'Linear'"),
        ("no_such_module:build", "importable module"),
        ("builtins:dict", "found dict"),
        ({"functon": "a:b"}, "Did you mean 'function'"),
        ("/no/such/folder", "check the path"),
    ],
)
def test_models_that_cannot_be_built(spec, said):
    with pytest.raises(BadModel, match=said):
        load_model(spec)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.pkl", "w.safetensors", "w.weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_handed_as_weights_is_refused_and_not_run(name, zipped, tmp_path):
    torch.save({"weight": Bomb()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for go in (lambda: load_weights(small(), tmp_path / name), lambda: load_model(tmp_path / name)):
        with pytest.raises(BadModel, match="never unpickles"):
            go()


def test_damaged_and_foreign_weights(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(small().state_dict(), file)
    whole = file.read_bytes()
    for wrong in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], whole + b"x"):
        file.write_bytes(wrong)
        with pytest.raises(BadModel, match="damaged or missing"):
            load_weights(small(), file)
    file.write_bytes(whole)
    with pytest.raises(BadModel, match="of the shapes"):
        load_weights(small(7), file)
    with pytest.raises(BadModel, match="missing"):
        load_weights(mlp(), file)
    with pytest.raises(BadModel, match="say what builds it"):
        load_model(file)


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    """The first byte of a safetensors file is a length, which may be 0x80."""
    for extra in range(0, 300, 8):
        save_file(small().state_dict(), tmp_path / "w.safetensors", metadata={"note": "n" * extra})
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of such a length was made")
    load_weights(small(), tmp_path / "w.safetensors")


def test_a_transformers_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                    image_size=8, patch_size=4, num_labels=3)  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    again = load_model(tmp_path / "vit")
    x = torch.randn(2, 3, 8, 8)
    assert type(again) is type(model) and torch.equal(again(x).logits, model(x).logits)
    torch.save(model.state_dict(), tmp_path / "vit" / "pytorch_model.bin")
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(BadModel, match=r"pytorch_model\.bin, a pickle"):
        load_model(tmp_path / "vit")
    with pytest.raises(BadModel, match="download it on a connected machine"):
        load_model("no-one/no-such-model")
