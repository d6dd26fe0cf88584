import pytest

from manifests.descriptions import Decoding, Description, KeptDescriptions
from manifests.errors import BadInputError

DECODING = Decoding(prompt="What is this?", max_new_tokens=4)
CAT = Description(image="cat.jpg", sha256="0" * 64, text="a cat")


def test_descriptions_go_on_where_they_were_interrupted(tmp_path):
    path = tmp_path / "out.json.partial"
    KeptDescriptions(path, "demo", DECODING).add(CAT)
    with path.open("a") as stream:
        stream.write('{"image": "dog')
    assert KeptDescriptions(path, "demo", DECODING).by_image == {"cat.jpg": CAT}
    assert KeptDescriptions(path, "other", DECODING).by_image == {}
    assert KeptDescriptions(path, "demo", DECODING).by_image == {}


@pytest.mark.parametrize("content", [b"", b"half a download", b"\xff\xd8\xff\n\n", b'{"model": "x"}\n', b"[]\n"])
def test_what_is_something_else_stays(tmp_path, content):
    path = tmp_path / "out.json.partial"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="out.json.partial is not a list of descriptions: move it elsewhere"):
        KeptDescriptions(path, "demo", DECODING)
    assert path.read_bytes() == content
