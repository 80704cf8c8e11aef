"""The command against a real endpoint on loopback and a real model on disk, and how descriptions are read."""

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from chat_server import ChatServer, completion, describe
from datasets import ClassLabel, Dataset, Features, Value
from tiny_inputs import DESCRIPTIONS, save_clip, write_inputs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt
from microclip_hf.commands import describe as command
from microclip_hf.descriptions import chat
from microclip_hf.descriptions.asking import write_descriptions
from microclip_hf.descriptions.chat import NO_KEY, ChatError, LocalChat, find_api_key
from microclip_hf.descriptions.files import load_descriptions, read_description_columns, read_descriptions
from microclip_hf.descriptions.questions import NOTHING_SIMILAR, Questions, SimilarNames
from microclip_hf.descriptions.replies import Reply, ReplyFile
from microclip_hf.text_heads import normalize_name


ROOT = Path(__file__).parents[1]
NAMES = ["red disc", "green_square", "blue bar"]
# Each word of this language is followed by one other; a text that a prompt ends with leads to one sentence.
CHAIN = {"red": "Round", "green": "Even", "blue": "Long", "Round": "scarlet", "Even": "emerald", "Long": "azure"}
CHAIN |= {
    "scarlet": "shape.",
    "emerald": "box.",
    "azure": "stripe.",
    **dict.fromkeys(["shape.", "box.", "stripe."], "</s>"),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.0)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Runs the command on three classes; gives what it wrote."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    output = tmp_path / "out.json"

    def run(**options):
        options = {
            "class_names": tmp_path / "names.txt",
            "output": output,
            "llm": "tiny",
            "base_url": server.base_url,
            "domain": "a shape",
            "num_sentences": 6,
            **options,
        }
        flags = [
            [f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in options.items()
        ]
        command.main([text for flag in flags for text in flag])
        return json.loads(output.read_text(encoding="utf-8"))

    run.output, run.partial = output, tmp_path / "out.json.partial.jsonl"
    return run


def expected(name):
    return [f"{name} {verb} {about}." for verb in ("has fine", "has many") for about in ("shapes", "parts", "colours")]


def all_questions():
    return list(Questions(NAMES, domain="a shape", num_sentences=6))


def test_a_file_of_descriptions(server, run, tmp_path, capsys):
    assert run() == {name: expected(name.replace("_", " ")) for name in NAMES}
    assert list(json.loads(run.output.read_text())) == NAMES
    assert read_descriptions(run.output, NAMES)["blue bar"] == expected("blue bar")
    assert sorted(server.questions) == sorted(all_questions())
    assert "18 sentences about 3 classes" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out.json.meta.json").read_text())
    assert meta["sha256"] == hashlib.sha256(run.output.read_bytes()).hexdigest()
    assert (meta["llm"], meta["base_url"], meta["domain"]) == ("tiny", server.base_url, "a shape")
    assert sorted(os.listdir(tmp_path)) == ["names.txt", "out.json", "out.json.meta.json"]
    with pytest.raises(SystemExit, match=r"out.json exists already"):
        run()


def test_what_is_sent(server, run, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    server.api_key = "sk-secret"
    extra_body = '{"max_tokens": null, "max_completion_tokens": 9}'
    run(extra_body=extra_body, questions=["Look of {}?", "{} or {similar}?"], num_sentences=2, temperature=0)
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions"
    (message,) = body.pop("messages")
    assert body == {"model": "tiny", "stream": False, "temperature": 0, "max_completion_tokens": 9}
    assert message["role"] == "user" and "one sentence and nothing else" in message["content"]
    starts = {question.split("? ")[0] for question in server.questions}
    assert "green square is a shape. Look of green square" in starts
    assert f"red disc is a shape. red disc or {NOTHING_SIMILAR}" in starts
    assert not any("sk-secret" in path.read_text() for path in tmp_path.iterdir())


def test_where_keys_go(server, run, monkeypatch):
    run()
    assert {headers["authorization"] for _, headers, _ in server.requests} == {f"Bearer {NO_KEY}"}
    assert find_api_key("https://router.huggingface.co/v1") == "hf_secret"
    assert find_api_key("https://x.eu.endpoints.huggingface.cloud") == "hf_secret"
    for foreign in (
        "https://endpoints.huggingface.cloud.example.org",
        "https://my-endpoints.huggingface.cloud",
        "https://huggingface.co.example.org",
        "https://nothuggingface.co",
        "http://huggingface.co",
        "https://a.hf.space",
    ):
        assert find_api_key(foreign) == NO_KEY
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    for address in (
        "https://api.openai.com/v1",
        "https://router.huggingface.co/v1",
        "https://a.b.endpoints.huggingface.cloud",
    ):
        assert find_api_key(address) == "sk-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-“1”")
    with pytest.raises(ChatError, match="copy it anew") as error:
        find_api_key("https://api.openai.com/v1")
    assert "sk-" not in str(error.value)


def test_an_interrupted_run_goes_on(server, run, capsys):
    """By Ctrl-C in its fourth question; the line that a kill might have torn is added by hand."""

    def interrupt(question):
        if len(server.requests) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return describe(question)

    server.answer = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run(num_workers=1)
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler and not run.output.exists()
    assert len(run.partial.read_text().splitlines()) == 1 + len(server.questions) == 1 + 4
    with run.partial.open("a") as file:
        file.write('{"question": 7, "rep')
    assert run(num_workers=2) == {name: expected(name.replace("_", " ")) for name in NAMES}
    assert sorted(server.questions) == sorted(all_questions())
    assert "4 of 9 replies are there already" in capsys.readouterr().out


def test_a_second_interrupt_waits_for_no_reply(server, run, tmp_path):
    blocked = threading.Event()
    server.answer = lambda question: (blocked.wait(), describe(question))[1]
    flags = ["--class_names", tmp_path / "names.txt", "--output", run.output, "--llm", "tiny"]
    code = "import sys; from microclip_hf.commands.describe import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, flags), "--base_url", server.base_url]
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            while not server.requests and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert any("Ctrl-C again leaves" in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            assert "the same command goes on" in process.communicate(timeout=100)[1]
            assert process.returncode == 130 and not server.questions
        finally:
            blocked.set()


def test_other_settings_dont_go_on(server, run, tmp_path):
    server.answer = lambda question: describe(question) if "disc" in question else b"{"
    with pytest.raises(SystemExit, match="isn't a chat completion"):
        run(num_workers=1)
    kept = run.partial.read_bytes()
    for options, message in (
        ({"temperature": 0.5}, "temperature was 0.7 and is now 0.5"),
        ({"llm": "other", "domain": "a thing"}, "llm was 'tiny' and is now 'other'; domain was 'a shape' and"),
        ({"questions": "What is {}?"}, "questions was"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(**options)
    (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)))
    with pytest.raises(SystemExit, match="class_names was '3 names"):
        run()
    assert run.partial.read_bytes() == kept
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    for line in (
        "no reply",
        '{"question": 3, "cut_off": false}',
        '{"question": -1, "reply": "a", "cut_off": false}',
        '{"question": 9, "reply": "a", "cut_off": false}',
        '{"question": 3, "reply": null, "cut_off": false}',
        "[]",
    ):
        run.partial.write_bytes(kept + line.encode() + b"\n")
        with pytest.raises(SystemExit, match=r"line 5, isn't a reply .* Remove the line"):
            run()


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}', '{"settings": 1}\n', ' {"settings": {}}'])
def test_a_foreign_file_is_left_alone(server, run, content):
    run.partial.write_text(content)
    with pytest.raises(SystemExit, match=r"isn't a file of this command\. Choose another --output"):
        run()
    assert run.partial.read_text() == content and not server.requests


def test_a_first_line_that_a_kill_has_torn(run):
    run.partial.write_text('{"settings": {"llm": "ti')
    assert len(run()) == 3


def test_a_server_that_comes_back_at_another_address(server, run, tmp_path):
    server.answer = lambda question: describe(question) if "disc" in question else b"{"
    with pytest.raises(SystemExit, match="isn't a chat completion"):
        run(num_workers=1)
    with ChatServer() as other:
        assert run(base_url=other.base_url) == {name: expected(name.replace("_", " ")) for name in NAMES}
        assert len(other.questions) == 9 - 3
        assert json.loads((tmp_path / "out.json.meta.json").read_text())["base_url"] == other.base_url


def test_a_busy_endpoint_is_asked_again(server, run, monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 1e6)  # the server says how long to wait
    server.fail(429, Retry_After="0")
    server.fail(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
    assert len(run(num_workers=1)) == 3
    assert len(server.requests) == 9 + 2


@pytest.mark.parametrize("header", ["inf", "nan", "1e999", "soon", "Wed, 21 Oct 99999 07:28:00 GMT"])
def test_an_unreadable_time_to_wait(server, run, header):
    """Then the pause of its own is taken, which is none here."""
    server.fail(429, Retry_After=header)
    assert len(run(num_workers=1)) == 3
    assert len(server.requests) == 9 + 1


def test_lost_connections_and_errors_of_the_server(server, run):
    for status in ("drop", 500, 502, "drop", 408):
        server.fail(status)
    assert len(run(num_workers=1)) == 3
    assert len(server.requests) == 9 + 5


def test_a_time_out(server, run):
    blocked = threading.Event()

    def answer(question):
        if len(server.requests) == 1:
            blocked.wait()
        return describe(question)

    server.answer = answer
    assert len(run(num_workers=1, timeout=1)) == 3
    blocked.set()
    assert len(server.requests) == 9 + 1


@pytest.mark.parametrize(
    ("answer", "failure", "message"),
    [
        (b"<html>", None, "isn't a chat completion"),
        ({"choices": []}, None, "it has no choices"),
        ({"object": "error"}, None, "it has no choices"),
        ([], None, "isn't a chat completion"),
        ({"choices": [{"text": "a"}]}, None, "isn't a chat completion"),
        (completion([{"type": "text"}]), None, "content is a list"),
        (None, (404, 100), "status 404: .*As the test asked for.* 'tiny' the endpoint's name of a model"),
        (None, (401, 100), "Is OPENAI_API_KEY set"),
        (None, (400, 100), "status 400: "),
        (None, (500, 100), "Gave up after 6 tries"),
        (None, ("drop", 100), "can't be reached .*Gave up"),
        (None, (429, 100, {"Retry_After": "4000"}), "come back in 4000 s"),
    ],
)
def test_an_endpoint_that_cant_be_used(server, run, answer, failure, message):
    if failure is not None:
        server.fail(*failure[:2], **(failure[2] if len(failure) > 2 else {}))
    server.answer = lambda _: answer
    with pytest.raises(SystemExit, match=message):
        run()
    assert not run.output.exists() and not run.partial.exists()


def test_no_endpoint(server, run, monkeypatch):
    with pytest.raises(SystemExit, match=r"can't be reached .*Is it running"):
        run(base_url="http://127.0.0.1:9/v1")
    for address, message in (
        ("localhost:8000", "isn't the address of an endpoint"),
        ("http://[::1", r"--base_url http://\[::1 isn't the address"),
        ("http://localhost:port/v1", "--base_url .* isn't the address"),
        ("http://me:pw@localhost", "OPENAI_API_KEY"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(base_url=address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="unset it"):
        run()


def test_replies_before_an_error_are_kept(server, run):
    """Also those that were on their way when it came."""
    together = threading.Barrier(3)

    def answer(question):
        if len(server.requests) <= 3:
            together.wait()
        return {"choices": []} if question == all_questions()[0] else describe(question)

    server.answer = answer
    with pytest.raises(SystemExit, match="no choices"):
        run(num_workers=3)
    answered = set(server.questions) - {all_questions()[0]}
    assert len(answered) >= 2 and len(run.partial.read_text().splitlines()) == 1 + len(answered)
    server.questions.clear()
    server.answer = describe
    run()
    assert sorted([*answered, *server.questions]) == sorted(all_questions())


def test_questions_are_asked_side_by_side(server, run):
    """The server answers only once three have come."""
    together = threading.Barrier(3)
    server.answer = lambda question: (together.wait(), describe(question))[1]
    run(num_workers=3)
    assert server.most_at_once == 3


def test_classes_about_which_nothing_is_said(server, run, tmp_path):
    def answer(question):
        if question.startswith("green square"):
            return "I'm sorry, but I can't help with that."
        return completion(None, "length") if question.startswith("red disc") else describe(question)

    server.answer = answer
    with pytest.warns(UserWarning, match=r"of 2 of 3 classes, .* 'red disc', 'green_square'. The first .* is ''"):
        assert run() == {"blue bar": expected("blue bar")}
    meta = json.loads((tmp_path / "out.json.meta.json").read_text())
    assert meta["classes_without_sentences"] == ["red disc", "green_square"]


def test_half_a_character_in_a_reply(server, run, tmp_path):
    """The reply is kept as it came; the half is left out, also where a reply is JSON with escapes."""

    def answer(question):
        name = next(name for name in NAMES if question.startswith(name.replace("_", " "))).replace("_", " ")
        sentences = [f"{name} has a fine rim \ud83d.", f"{name} \ufffd has a \udf4e fine edge."]
        return json.dumps(sentences) if name == "red disc" else "\n".join(sentences)

    server.answer = answer
    save_clip(tmp_path / "clip")
    assert run(model_name_or_path=tmp_path / "clip") == {
        name: [f"{name.replace('_', ' ')} has a fine {part}." for part in ("rim", "edge")] for name in NAMES
    }
    with pytest.raises(SystemExit, match=r"domain holds 'caf\\udce9' with half a character"):
        run(domain="caf\udce9", output=tmp_path / "other.json")


def test_nothing_is_said_at_all(server, run):
    server.answer = lambda _: "As an AI, I have no eyes."
    with pytest.raises(
        SystemExit, match="Nothing usable is left of the 9 replies; the first one is 'As an AI"
    ) as ended:
        run()
    assert f"with another --output or after removing the replies, which are kept in {run.partial}" in ended.value.code
    assert not run.output.exists() and run.partial.exists()


def test_the_same_sentence_for_all_classes(server, run):
    server.answer = lambda question: f"A very  nice thing.\n{describe(question)}"
    with pytest.warns(UserWarning, match=r"'A very nice thing.' was said of 3 of 3 classes"):
        assert run() == {name: expected(name.replace("_", " "))[:5] for name in NAMES}
    run.output.rename(run.output.with_name("first.json"))
    run.output.with_name("out.json.meta.json").unlink()
    server.answer = lambda question: "A very nice thing."
    with (
        pytest.warns(UserWarning, match="A very nice thing"),
        pytest.raises(SystemExit, match="Nothing usable is left"),
    ):
        run()


def fill(folder, texts, **options):
    """A file of answers, one question a class."""
    questions = Questions([f"class {i}" for i in range(len(texts))], ["What is {}?"], **options)
    answers = ReplyFile(folder / "answers.jsonl", {}, len(questions))
    with answers:
        for number, text in enumerate(texts):
            answers.add(number, Reply(text))
    return questions, ReplyFile(folder / "answers.jsonl", {}, len(questions))


@pytest.mark.filterwarnings("ignore:.*said of")
def test_shared_sentences_against_counting_all(tmp_path):
    rng = random.Random(0)
    common = [
        [f"It is common {word}." for word in ("one", "two", "three", "four")[: rng.randint(1, 4)]] for _ in range(41)
    ]
    sentences = [[*own, *(f"It is rare {rng.randint(0, 60)} times." for _ in range(4 - len(own)))] for own in common]
    for own in sentences:
        rng.shuffle(own)
    counts = Counter(sentence for own in sentences for sentence in set(own))
    shared = {sentence: count for sentence, count in counts.items() if count > 41 / 2}
    assert 0 < len(shared) < 4
    questions, answers = fill(tmp_path, ["\n".join(own) for own in sentences], num_sentences=4)
    with answers:
        outcome = write_descriptions(tmp_path / "out.json", questions, answers, None)
    assert outcome.shared == shared
    left = {f"class {i}": list(dict.fromkeys(s for s in own if s not in shared)) for i, own in enumerate(sentences)}
    assert json.loads((tmp_path / "out.json").read_text()) == {name: own for name, own in left.items() if own}


def test_similar_names():
    names = ["amber-tailed wren", "silver tailed wren", "Amber_Tailed Jay", "sunflower", "windflower", "daisy", "iris"]
    similar = SimilarNames(names)
    assert similar.find(0) == ["silver tailed wren", "Amber_Tailed Jay"]
    assert similar.find(3) == ["windflower"] and similar.find(5) == [] == similar.find(6)
    many = [f"bird {i:05}" for i in range(3000)]
    assert len(set(SimilarNames(many).find(1500))) == 3
    question = Questions(["sea wren", "wood wren"], ["{}: not {similar}?"], "a bird.", 1)[1]
    assert question.startswith("wood wren is a bird. wood wren: not sea wren? Answer with one sentence")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_sentences", 0, "--num_sentences is 0"),
        ("temperature", -1, "--temperature is -1"),
        ("temperature", "nan", "--temperature is nan"),
        ("temperature", "inf", "--temperature is inf"),
        ("timeout", "nan", "--timeout is nan"),
        ("timeout", "inf", "--timeout is inf"),
        ("timeout", "1e12", "at most 86400 seconds"),
        ("output", "", "--output '' isn't the name of a file"),
        ("output", "folder/", "--output 'folder/' isn't the name of a file"),
        ("output", ".", "--output '.' isn't the name of a file"),
        ("extra_body", '{"a": NaN}', "isn't JSON"),
        ("extra_body", '{"a": [1e999]}', "isn't JSON"),
        ("class_names", "none.txt", "there is no such file"),
        ("output", "none/out.json", "there is no folder"),
        ("questions", "What is it?", "no '{}'"),
        ("extra_body", "{", "isn't JSON"),
        ("extra_body", "1", "must be a JSON object"),
        ("model_name_or_path", "/none/clip", "--model_name_or_path /none/clip must be the Hub id or folder of a CLIP"),
    ],
)
def test_bad_settings(server, run, option, value, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(**{option: value})
    assert not server.requests


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("class_names", "none.txt", "--class_names none.txt: there is no such file"),
        ("output", "none/out.json", "there is no folder"),
        ("batch_size", 0, "--batch_size is 0"),
        ("extra_body", "{}", "--extra_body is for an endpoint"),
        ("questions", "What is it?", "no '{}'"),
    ],
)
def test_bad_settings_are_found_before_a_model_is_loaded(tmp_path, monkeypatch, option, value, message):
    monkeypatch.setattr(command, "LocalChat", None)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    options = {"class_names": tmp_path / "names.txt", "output": tmp_path / "out.json", "llm": "no/llm", option: value}
    with pytest.raises(SystemExit, match=re.escape(message)):
        command.main([text for name, value in options.items() for text in (f"--{name}", str(value))])


def test_an_output_folder_that_cannot_be_written_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(command, "LocalChat", None)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    options = ["--class_names", tmp_path / "names.txt", "--output", tmp_path / "out.json", "--llm", "no/llm"]
    with pytest.raises(SystemExit, match=f"--output: the folder {tmp_path} can't be written: Read-only file system"):
        command.main([*map(str, options)])


def test_the_example_of_descriptions():
    names = ["Tree Sparrow", "house_sparrow", "dunnock", "chaffinch"]
    found = read_descriptions(ROOT / "examples" / "descriptions.json", names)
    assert list(found) == names
    for name, sentences in found.items():
        assert len(set(sentences)) == 5
        assert all(normalize_name(name) in sentence and len(sentence.split()) <= 25 for sentence in sentences)


def save_llm(folder, chat_template="{{ messages[0]['content'].split(' ')[0] }}"):
    """A Llama of one-hot words, whose layers add nothing: after each word comes the one that `CHAIN` says."""
    words = ["</s>", "<unk>", *dict.fromkeys([*CHAIN, *CHAIN.values()])]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    width = len(words) + len(words) % 2
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), width))
        model.lm_head.weight.zero_()
        for word, following in CHAIN.items():
            model.lm_head.weight[words.index(following), words.index(word)] = 20
    model.save_pretrained(folder)


def test_a_model_on_this_machine(run, tmp_path, capsys):
    save_llm(tmp_path / "llm")
    options = {"llm": tmp_path / "llm", "questions": ["What is {}?"], "batch_size": 2}
    flags = [
        "--class_names",
        tmp_path / "names.txt",
        "--output",
        run.output,
        "--domain",
        "a shape",
        "--max_new_tokens",
        8,
    ]
    flags += [
        text for name, value in options.items() for text in (f"--{name}", *([value] if name != "questions" else value))
    ]
    command.main(list(map(str, flags)))
    expected = {"red disc": ["Round scarlet shape."], "green_square": [], "blue bar": ["Long azure stripe."]}
    assert json.loads(run.output.read_text()) == {**expected, "green_square": ["Even emerald box."]}


def test_a_model_on_this_machine_that_is_cut_off_or_no_chat_model(tmp_path):
    save_llm(tmp_path / "llm")
    local = LocalChat(str(tmp_path / "llm"), batch_size=2, max_new_tokens=2, temperature=0)
    questions = [(5, "red thing"), (6, "blue thing"), (7, "stripe. thing")]
    assert dict(local.replies(questions)) == {
        5: Reply("Round scarlet", True),
        6: Reply("Long azure", True),
        7: Reply(""),
    }
    save_llm(tmp_path / "base", chat_template=None)
    with pytest.raises(ChatError, match="no chat template"):
        LocalChat(str(tmp_path / "base"), 1, 8, 0)


def test_what_cant_be_loaded_on_this_machine(run, tmp_path, clip_folder):
    save_llm(tmp_path / "corrupt")
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"x" * 100)
    save_llm(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    for source, message in (
        (tmp_path / "none", "none can't be loaded"),
        (tmp_path / "corrupt", "header"),
        (tmp_path / "quantized", "AWQ .*requires"),
        (clip_folder, "CLIPConfig.* Pass the Hub id or the folder of a causal language model"),
    ):
        with pytest.raises(ChatError, match=message) as error:
            LocalChat(str(source), 1, 8, 0)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_clip_without_a_tokenizer(server, run, tmp_path, clip_folder):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(
        SystemExit, match=r"--model_name_or_path .* tokenizer.* Pass a CLIP that was saved with"
    ) as ended:
        run(model_name_or_path=tmp_path / "clip")
    assert "tokenizer=" not in ended.value.code and not server.requests


def test_text_files(tmp_path):
    names = ["iris", "iris: dwarf", "wind_flower"]
    path = tmp_path / "descriptions.TXT"
    path.write_text(
        "\ufeffIris: Tall: and blue.\n\nWind-Flower:White.\niris: dwarf: Low.\niris: Purple.\n", encoding="utf-8"
    )
    assert read_descriptions(path, names) == {
        "iris": ["Tall: and blue.", "Purple."],
        "iris: dwarf": ["Low."],
        "wind_flower": ["White."],
    }
    for content, message in (
        ("iris: a\nrose: b\n", r"line 2, is 'rose: b'; expected 'class: sentence'"),
        ("Wind Flowr: a\n", "The nearest to 'Wind Flowr' in names.txt is 'wind_flower': make the two the same"),
        ("iris\n", "line 1, is 'iris'"),
        ("iris: \n", "an empty sentence"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_descriptions(path, names, "names.txt")
    path.write_bytes("iris: Süß".encode("latin-1"))
    with pytest.raises(ValueError, match="isn't text in UTF-8"):
        read_descriptions(path, names)


def test_columns_of_a_data_set():
    rows = {"kind": ["Red-Disc", "blue bar", "red disc"], "text": ["Round.", "Long.", "Red."]}
    expected = {"red disc": ["Round.", "Red."], "blue bar": ["Long."]}
    assert read_description_columns(Dataset.from_dict(rows), NAMES, ["kind", "text"]) == expected
    lists = {"kind": ["blue bar", "red disc"], "text": [["Long."], ["Round.", "Red."]]}
    assert read_description_columns(Dataset.from_dict(lists), NAMES, ("kind", "text")) == expected
    labels = Features({"kind": ClassLabel(names=["blue bar", "red disc"]), "text": Value("string")})
    numbered = Dataset.from_dict({**rows, "kind": [1, 0, 1]}, features=labels)
    assert read_description_columns(numbered, NAMES, ["kind", "text"]) == expected
    with pytest.warns(UserWarning, match="1 described classes aren't among the 2 .* 'blue bar'"):
        assert read_description_columns(Dataset.from_dict(rows), NAMES[:2], ["kind", "text"]) == {
            "red disc": ["Round.", "Red."]
        }
    for changes, columns, message in (
        ({}, ["kind"], "two are needed"),
        ({}, None, "'kind', 'text' two are needed"),
        ({}, ["kind", "sentence"], "no column 'sentence'"),
        ({"kind": [0, 1, 0]}, ["kind", "text"], "Row 0 has the class 0"),
        ({"text": ["a", None, "b"]}, ["kind", "text"], "Row 1 has the class 'blue bar' and the sentences None"),
        ({"kind": ["a", "b", "c"]}, ["kind", "text"], "None of the classes .* is one of the 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_description_columns(Dataset.from_dict({**rows, **changes}), NAMES, columns)


@pytest.mark.parametrize("kind", ["text", "data set"])
def test_adapt_reads_them(tmp_path, monkeypatch, kind):
    write_inputs(tmp_path)
    pairs = [(name, sentence) for name, own in DESCRIPTIONS.items() for sentence in own]
    (tmp_path / "lines.txt").write_text("".join(f"{name}: {sentence}\n" for name, sentence in pairs))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text("".join(json.dumps({"k": n, "s": s}) + "\n" for n, s in pairs))
    assert load_descriptions(str(tmp_path / "repo"), list(DESCRIPTIONS), ["k", "s"]) == DESCRIPTIONS
    flags = [
        "--model_name_or_path",
        tmp_path / "clip",
        "--train_dir",
        tmp_path / "photos",
        "--use_cpu",
        "--max_steps",
        1,
    ]
    flags += ["--class_names", tmp_path / "names.txt", "--num_crops", 1, "--output_dir", tmp_path / "out"]
    flags += ["--config_overrides", '{"prior_weighting": "uniform"}']
    own = ["--descriptions", tmp_path / "lines.txt"]
    if kind == "data set":
        own = ["--descriptions_dataset", tmp_path / "repo", "--descriptions_columns", "k", "s"]
    adapt.main(list(map(str, [*flags, *own])))
    assert json.loads((tmp_path / "out" / "descriptions.json").read_text()) == DESCRIPTIONS
    assert "descriptions.json" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(MicroCLIPForImageClassification, "from_clip", None)
    for wrong, message in (
        (["--descriptions", tmp_path / "lines.txt", "--descriptions_dataset", "x"], "either --descriptions or"),
        (["--descriptions_columns", "k", "s"], "pass that too"),
        (["--descriptions_dataset", tmp_path / "repo"], "'k', 's' two are needed"),
        (["--descriptions_dataset", tmp_path / "none", "--descriptions_columns", "k", "s"], "can't be loaded"),
    ):
        with pytest.raises(SystemExit, match=message):
            adapt.main(
                list(map(str, [*flags[:-1], '{"prior_weighting": "uniform"}', "--output_dir", tmp_path / "x", *wrong]))
            )
