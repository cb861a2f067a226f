"""Requests that must be refused: (name, body, words that the error must contain)."""

from __future__ import annotations

import json


def _inputs(value: object) -> bytes:
    return json.dumps({"inputs": value}).encode()


def _parameters(value: object) -> bytes:
    return json.dumps({"inputs": "Write 7 in words.", "parameters": value}).encode()


def _body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _raw(parameter: str, value: str) -> bytes:
    """A value that json.dumps would not write."""
    return b'{"inputs": "x", "parameters": {"%s": %s}}' % (parameter.encode(), value.encode())


BROKEN_JSON = [
    ("empty body", b"", "body is empty"),
    ("blank body", b" \r\n\t", "body is empty"),
    ("not JSON", b"hello", "not JSON: Expecting value at line 1 column 1"),
    ("cut short", b'{"inputs": "x"', "not JSON"),
    ("trailing comma", b'{"inputs": "x",}', "not JSON"),
    ("two objects", b'{"inputs": "x"}{"inputs": "y"}', "not JSON: Extra data"),
    ("single quotes", b"{'inputs': 'x'}", "not JSON"),
    ("comment", b'{"inputs": "x"} // y', "not JSON"),
    ("raw newline in a string", b'{"inputs": "a\nb"}', "Invalid control character"),
    ("bad escape", b'{"inputs": "\\x41"}', "Invalid \\escape"),
    ("not UTF-8", b'{"inputs": "\xff"}', "not UTF-8: byte 0xff at offset 12"),
    ("UTF-16", '{"inputs": "x"}'.encode("utf-16"), "not UTF-8"),
    ("cut UTF-8", b'{"inputs": "\xc3"}', "not UTF-8"),
    ("UTF-8 surrogate bytes", b'{"inputs": "\xed\xa0\x80"}', "not UTF-8"),
    ("deep arrays", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ("a number of 5000 digits", _raw("seed", "9" * 5000), "too many digits"),
    ("NaN", _raw("temperature", "NaN"), "NaN is not a JSON number"),
    ("Infinity", _raw("temperature", "Infinity"), "Infinity is not a JSON number"),
    ("-Infinity", _raw("length_penalty", "-Infinity"), "-Infinity is not a JSON number"),
    ("1e400", _raw("temperature", "1e400"), "'1e400' is too large"),
    ("-1e400", _raw("length_penalty", "-1e400"), "'-1e400' is too large"),
    ("a field twice", b'{"inputs": "a", "inputs": "b"}', "'inputs' occurs twice"),
    ("a parameter twice", _raw("top_k", '1, "top_k": 2'), "'top_k' occurs twice"),
]

WRONG_SHAPE = [
    ("a string as body", b'"hello"', "must be a JSON object"),
    ("a list as body", b'[{"inputs": "x"}]', "must be a JSON object"),
    ("a number as body", b"1", "must be a JSON object"),
    ("null as body", b"null", "must be a JSON object"),
    ("no inputs", b"{}", "'inputs' is missing"),
    ("null inputs", _inputs(None), "'inputs' is missing"),
    ("a number as inputs", _inputs(5), "must be a string or a list of strings, got 5"),
    ("a boolean as inputs", _inputs(True), "must be a string or a list of strings, got True"),
    ("an object as inputs", _inputs({"text": "x"}), "must be a string or a list of strings"),
    ("an empty list", _inputs([]), "'inputs' is an empty list"),
    ("an empty string", _inputs(""), "inputs must not be empty or blank, got ''"),
    ("a blank string", _inputs(" \n\t"), "inputs must not be empty or blank"),
    ("an ideographic space", _inputs("\u3000"), "inputs must not be empty or blank"),
    ("a number in the list", _inputs(["a", 7]), "inputs[1] must be a string, got 7"),
    ("null in the list", _inputs(["a", "b", None]), "inputs[2] must be a string, got None"),
    ("a list in the list", _inputs([["a"]]), "inputs[0] must be a string, got ['a']"),
    ("an empty string in the list", _inputs(["a", ""]), "inputs[1] must not be empty or blank"),
    ("half a surrogate pair", b'{"inputs": "a\\ud83d"}', "half a surrogate pair at character 1"),
    (
        "half a pair in the list",
        b'{"inputs": ["a", "\\udc00"]}',
        "inputs[1] holds half a surrogate",
    ),
    ("a pair in wrong order", b'{"inputs": "\\udc00\\ud83d"}', "half a surrogate pair"),
    ("an unknown field", b'{"inputs": "x", "foo": 1}', "unknown field 'foo'; allowed are inputs"),
    ("a parameter beside inputs", b'{"inputs": "x", "top_p": 1}', "'top_p'; it is a parameter"),
    ("a misspelt field", b'{"input": "x"}', "unknown field 'input'; did you mean 'inputs'?"),
    ("parameters misspelt", b'{"inputs": "x", "parameter": {}}', "did you mean 'parameters'?"),
    ("a field of an odd name", b'{"inputs": "x", "\\n\\u00e9": 1}', "unknown field '\\n\\xe9'"),
    ("parameters a list", _parameters([]), "'parameters' must be an object, got []"),
    ("parameters a string", _parameters("{}"), "'parameters' must be an object, got '{}'"),
    ("parameters a number", _parameters(1), "'parameters' must be an object, got 1"),
    ("too long an input", _inputs("word " * 5000), "tokens, allowed are 1024"),
    ("too long in the list", _inputs(["a", "word " * 5000]), "inputs[1]: the input has"),
]

WRONG_PARAMETERS = [
    ("unknown", _parameters({"foo": 1}), "unknown parameter 'foo'; known are max_new_tokens"),
    ("misspelt", _parameters({"temprature": 1}), "did you mean 'temperature'?"),
    ("in capitals", _parameters({"TOP_K": 1}), "did you mean 'top_k'?"),
    ("hyphenated", _parameters({"top-p": 0.5}), "did you mean 'top_p'?"),
    ("no name", _parameters({"": 1}), "unknown parameter ''"),
    ("max_new_tokens zero", _parameters({"max_new_tokens": 0}), "an integer from 1"),
    ("max_new_tokens negative", _parameters({"max_new_tokens": -5}), "got -5"),
    (
        "max_new_tokens above",
        _parameters({"max_new_tokens": 513}),
        "at most 512 (option.max_output",
    ),
    ("max_new_tokens text", _parameters({"max_new_tokens": "20"}), "got '20'"),
    ("max_new_tokens fraction", _parameters({"max_new_tokens": 1.5}), "got 1.5"),
    ("max_new_tokens boolean", _parameters({"max_new_tokens": True}), "got True"),
    ("max_new_tokens list", _parameters({"max_new_tokens": [20]}), "got [20]"),
    ("max_new_tokens huge", _parameters({"max_new_tokens": 10**400}), "an integer from 1"),
    ("by its alias", _parameters({"max_seq_len": 0}), "parameter 'max_seq_len' must be an integer"),
    ("aliases differ", _parameters({"max_length": 9, "max_tokens": 8}), "mean the same and differ"),
    (
        "min above max",
        _parameters({"min_length": 9, "max_length": 8}),
        "at most max_new_tokens (8)",
    ),
    ("min negative", _parameters({"min_new_tokens": -1}), "an integer from 0"),
    ("do_sample text", _parameters({"do_sample": "yes"}), "true or false, got 'yes'"),
    ("do_sample number", _parameters({"do_sample": 1}), "true or false, got 1"),
    ("temperature negative", _parameters({"temperature": -0.1}), "from 0 to 1000000, got -0.1"),
    ("temperature text", _parameters({"temperature": "hot"}), "a number from 0"),
    ("temperature boolean", _parameters({"temperature": True}), "a number from 0"),
    ("temperature huge", _parameters({"temperature": 10**400}), "a number from 0"),
    ("temperature object", _parameters({"temperature": {}}), "a number from 0"),
    ("top_k negative", _parameters({"top_k": -1}), "an integer from 0"),
    ("top_k fraction", _parameters({"top_k": 0.5}), "an integer from 0"),
    ("top_p above", _parameters({"top_p": 1.01}), "a number from 0 to 1, got 1.01"),
    ("top_p negative", _parameters({"top_p": -1}), "a number from 0 to 1"),
    ("typical_p above", _parameters({"typical_p": 2}), "a number from 0 to 1"),
    ("typical_p text", _parameters({"typical_p": "0.9"}), "a number from 0 to 1, got '0.9'"),
    ("num_beams zero", _parameters({"num_beams": 0}), "an integer from 1"),
    ("num_beams above", _parameters({"beam_width": 17}), "at most 16 (option.max_rows), got 17"),
    ("long stop", _parameters({"stop": "z" * 257}), "of 256 characters or ids each"),
    ("top tokens of beams", _parameters({"num_beams": 2, "top_n_tokens": 3}), "must be 0 with"),
    ("a bad word of no tokens", _parameters({"bad_words": "\u65e5"}), "must hold words of this"),
    ("length_penalty text", _parameters({"length_penalty": "1"}), "a number from -10 to 10"),
    ("early_stopping text", _parameters({"early_stopping": "always"}), 'true, false or "never"'),
    ("n without sampling", _parameters({"n": 2}), "at most num_beams (1) unless"),
    ("n above", _parameters({"n": 17, "do_sample": True}), "at most 16 (option.max_rows)"),
    ("seed negative", _parameters({"seed": -1}), "an integer from 0"),
    ("seed above", _parameters({"seed": 2**64}), "to 18446744073709551615"),
    ("seed fraction", _parameters({"seed": 0.5}), "an integer from 0"),
    ("repetition_penalty zero", _parameters({"repetition_penalty": 0}), "a number above 0"),
    ("repetition_penalty negative", _parameters({"repetition_penalty": -1.2}), "got -1.2"),
    ("repetition_penalty above", _parameters({"repetition_penalty": 101}), "above 0, to 100"),
    ("repetition_penalty list", _parameters({"repetition_penalty": [1.2]}), "got [1.2]"),
    ("presence_penalty above", _parameters({"presence_penalty": 3}), "from -2 to 2"),
    ("presence_penalty text", _parameters({"presence_penalty": "1"}), "from -2 to 2, got '1'"),
    ("frequency_penalty below", _parameters({"frequency_penalty": -3}), "from -2 to 2"),
    ("frequency_penalty boolean", _parameters({"frequency_penalty": True}), "got True"),
    ("no_repeat_ngram_size", _parameters({"no_repeat_ngram_size": -1}), "an integer from 0"),
    ("no_repeat_ngram_size half", _parameters({"no_repeat_ngram_size": 2.5}), "got 2.5"),
    ("stop a number", _parameters({"stop": 5}), "a string, a list of strings"),
    ("stop mixed", _parameters({"stop": ["a", 5]}), "a string, a list of strings"),
    ("stop an empty string", _parameters({"stop": [""]}), "an empty string or half a"),
    ("stop half a surrogate pair", _raw("stop", '"a\\ud83d"'), "half a surrogate pair is none"),
    ("bad words half a pair", _raw("bad_words", '["\\udc00"]'), "half a surrogate pair is none"),
    ("stop ids without ends", _parameters({"stop_words_list": [[1, 2, 3]]}), "end offsets"),
    ("stop ids ends too far", _parameters({"stop_words_list": [[1], [2]]}), "end offsets"),
    ("stop ids negative", _parameters({"stop_words_list": [[-1], [1]]}), "end offsets"),
    ("bad words an object", _parameters({"bad_words": {}}), "a string, a list of strings"),
    (
        "bad words blank",
        _parameters({"bad_words": ["cat", " "]}),
        "must hold words of this model's",
    ),
    ("bad words of padding", _parameters({"bad_words": [[640], [1]]}), "tokens, got (640,)"),
    ("bad words the end", _parameters({"bad_words": "</s>"}), "must not hold the end of the text"),
    ("bad words the end as id", _parameters({"bad_words": [[1], [1]]}), "send ignore_eos_token"),
    ("details text", _parameters({"details": "true"}), "true or false"),
    ("top_n_tokens above", _parameters({"top_n_tokens": 21}), "an integer from 0 to 20"),
    ("truncate zero", _parameters({"truncate": 0}), "true, false or the most input tokens"),
    ("truncate above", _parameters({"truncate": 2000}), "at most 1024 (option.max_input_tokens)"),
    ("stream text", _parameters({"stream": "yes"}), "true or false"),
    ("stream beside", b'{"inputs": "x", "stream": 1}', "parameter 'stream' must be true or false"),
    (
        "stream twice",
        b'{"inputs": "x", "stream": true, "parameters": {"stream": false}}',
        "send one of them",
    ),
    (
        "stream with beams",
        _parameters({"stream": True, "num_beams": 2}),
        "'stream' must be false with num_beams > 1",
    ),
    (
        "a stream of several",
        _parameters({"stream": True, "n": 2, "temperature": 1}),
        "'stream' must be false with num_return_sequences > 1",
    ),
    ("a stream of a list", _body(inputs=["a", "b"], stream=True), "a list cannot be streamed, got"),
    ("a stream of a list of one", _body(inputs=["a"], stream=True), "a list cannot be streamed"),
    ("watermark", _parameters({"watermark": True}), "parameter 'watermark' is not supported"),
    (
        "a grammar of JSON",
        _parameters({"grammar": {"type": "json", "value": {}}}),
        "'grammar' must",
    ),
    ("a grammar of no value", _parameters({"grammar": {"type": "regex"}}), "'grammar' must be"),
    ("a grammar that is none", _parameters({"grammar": {"type": "regex", "value": 5}}), "a string"),
    (
        "grammar and regex",
        _parameters({"grammar": {"type": "regex", "value": "a"}, "regex": "a"}),
        "'grammar' and 'regex' mean the same",
    ),
    ("adapter_id", _parameters({"adapter_id": "x"}), "parameter 'adapter_id' is not supported"),
    ("prefill", _parameters({"decoder_input_details": True}), "'decoder_input_details' is not"),
]

WRONG_TEMPLATES = [
    ("no text", _body(inputs="x", template=5), "'template' must be a string, got 5"),
    ("an empty template", _body(inputs="x", template=""), "must contain {input}, got ''"),
    ("no place", _body(inputs="x", template="a {b}"), "must contain {input}, got 'a {b}'"),
    ("no place but braces", _body(inputs="x", template="{{input}}"), "must contain {input}"),
    ("a single brace", _body(inputs="x", template="{input} }"), "a single one at character 8"),
    ("an open brace", _body(inputs="x", template="{input} {"), "a single one at character 8"),
    ("a format", _body(inputs="x", template="{input!r}"), "a single one at character 0"),
    ("an attribute", _body(inputs="x", template="{input.a}"), "a single one at character 0"),
    ("a number", _body(inputs="x", template="{input} {0}"), "a single one at character 8"),
    (
        "no value",
        _body(inputs="x", template="{language}: {input}"),
        "the template's {language} has no value; send it in 'variables'",
    ),
    (
        "not used",
        _body(inputs="x", template="{a} {input}", variables={"a": "b", "c": "d"}),
        "the variable 'c' is not used: the template has {a}, {input}",
    ),
    ("not used at all", _body(inputs="x", variables={"a": "b"}), "'a' is not used"),
    ("variables a list", _body(inputs="x", variables=["a"]), "'variables' must be an object"),
    (
        "a variable that is no text",
        _body(inputs="x", template="{a}{input}", variables={"a": 1}),
        "the variable 'a' must be a string, got 1",
    ),
    (
        "the input as a variable",
        _body(inputs="x", variables={"input": "y"}),
        "the variable 'input' is what 'inputs' holds",
    ),
    (
        "half a surrogate pair in a variable",
        b'{"inputs": "x", "template": "{a}{input}", "variables": {"a": "\\ud83d"}}',
        "half a surrogate pair",
    ),
    ("template misspelt", _body(inputs="x", templat="{input}"), "did you mean 'template'?"),
    ("inputs and prompt", _body(inputs="x", prompt="x"), "unknown field 'prompt'"),
]

BAD_REQUESTS = BROKEN_JSON + WRONG_SHAPE + WRONG_PARAMETERS + WRONG_TEMPLATES


def _prompt(prompt: object = "Write 7 in words.", **fields: object) -> bytes:
    return _body(prompt=prompt, **fields)


# OpenAI's schema: (name, body, words, the field that the error names)
BAD_COMPLETIONS: list[tuple[str, bytes, str, str | None]] = [
    ("no prompt", _prompt(None), "'prompt' is missing", "prompt"),
    ("a number", _prompt(5), "must be a string or a list of strings, got 5", "prompt"),
    ("an empty list", _prompt([]), "must be a string or a list of strings", "prompt"),
    ("half a character", b'{"prompt": "x", "model": "\\ud800"}', "half a surrogate pair", None),
    (
        "our name of theirs",
        _prompt("x", max_new_tokens=5),
        "unknown field 'max_new_tokens'",
        "max_new_tokens",
    ),
    ("an empty text", _prompt(""), "prompt must not be empty or blank", None),
    ("a blank one in the list", _prompt(["a", " "]), "prompt[1] must not be empty", None),
    ("token ids", _prompt([8774, 6]), "holds token ids, which are another tokenizer's", "prompt"),
    ("lists of token ids", _prompt([[8774], [6]]), "holds token ids", "prompt"),
    ("texts and ids", _prompt(["a", 6]), "prompt[1] must be a string, got 6", None),
    ("too long in the list", _prompt(["a", "word " * 5000]), "prompt[1]: the input has", None),
    ("an unknown field", _prompt(foo=1), "unknown field 'foo'; allowed are prompt", "foo"),
    ("a misspelt field", _prompt(max_token=1), "did you mean 'max_tokens'?", "max_token"),
    ("parameters", _prompt(parameters={}), "unknown field 'parameters'", "parameters"),
    ("max_tokens zero", _prompt(max_tokens=0), "an integer from 1", "max_tokens"),
    ("max_tokens above", _prompt(max_tokens=513), "at most 512", "max_tokens"),
    ("n above", _prompt(n=17), "'n' must be at most 16 (option.max_rows), got 17", "n"),
    ("temperature", _prompt(temperature="hot"), "a number from 0", "temperature"),
    ("top_p above", _prompt(top_p=2), "a number from 0 to 1", "top_p"),
    ("top_p boolean", _prompt(top_p=False), "a number from 0 to 1, got False", "top_p"),
    ("n zero", _prompt(n=0), "an integer from 1", "n"),
    ("n text", _prompt(n="2"), "got '2'", "n"),
    ("best_of below n", _prompt(n=3, best_of=2), "at least n (3), got 2", "best_of"),
    ("logprobs above", _prompt(logprobs=6), "an integer from 0 to 5, got 6", "logprobs"),
    ("logprobs as in a chat", _prompt(logprobs=True), "from 0 to 5, got True", "logprobs"),
    ("seed too small", _prompt(seed=-(2**63) - 1), "an integer from 0", "seed"),
    ("stop a number", _prompt(stop=5), "a string, a list of strings", "stop"),
    ("presence_penalty above", _prompt(presence_penalty=3), "from -2 to 2", "presence_penalty"),
    ("echo", _prompt(echo=True), "parameter 'echo' is not supported; leave it out", "echo"),
    ("suffix", _prompt(suffix="x"), "parameter 'suffix' is not supported", "suffix"),
    ("logit_bias", _prompt(logit_bias={"5": 1}), "'logit_bias' is not supported", "logit_bias"),
    ("model a number", _prompt(model=1), "'model' must be a string, got 1", "model"),
    ("user a number", _prompt(user=1), "'user' must be a string, got 1", "user"),
    ("stream text", _prompt(stream="yes"), "true or false", "stream"),
    ("a stream of a list", _prompt(["a"], stream=True), "a list cannot be streamed", None),
    ("options alone", _prompt(stream_options={}), "is for a stream", "stream_options"),
    (
        "options a list",
        _prompt(stream=True, stream_options=[]),
        "must be an object",
        "stream_options",
    ),
    (
        "an unknown option",
        _prompt(stream=True, stream_options={"usage": True}),
        "unknown field 'usage'",
        "usage",
    ),
    (
        "an option of the wrong type",
        _prompt(stream=True, stream_options={"include_usage": 1}),
        "true or false, got 1",
        "include_usage",
    ),
]
