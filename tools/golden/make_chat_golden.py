#!/usr/bin/env python3
"""Golden renderings of chat templates by Python's jinja2 with the settings of transformers.

Renders every *.jinja in the folder on every conversation below and writes cases.json beside them.

usage: make_chat_golden.py ../../runtime/tests/golden/chat
"""
import datetime, json, pathlib, sys
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

UNIX_SECONDS = 1732233600 + 45296


class Generation(jinja2.ext.Extension):
    """The tag marks text for training and prints what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format):
    return datetime.datetime.fromtimestamp(UNIX_SECONDS, datetime.timezone.utc).strftime(format)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = strftime_now


def m(role, content, **extra):
    return {"role": role, "content": content, **extra}


def call(name, arguments, id="abcdefgh1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather in a \"city\" <now> & later – °C", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1, "minimum": 0.5}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]
CASES = [
    {"messages": [m("user", "Hi")], "add_generation_prompt": True},
    {"messages": [m("user", "Hi")], "add_generation_prompt": False},
    {"messages": [m("system", "  Be brief. "), m("user", "Grüße 🙂\n\nsecond"), m("assistant", "Hello & <b>welcome</b>"), m("user", " bye\n")], "add_generation_prompt": True},
    {"messages": [m("system", "Be brief."), m("user", "2+2?"), m("assistant", "<think>\n2+2 is\n4\n</think>\n\nFour."), m("user", "Sure?"), m("assistant", "<think>again</think>\nYes.")], "add_generation_prompt": False},
    {"messages": [m("user", "2+2?")], "add_generation_prompt": True, "variables": {"enable_thinking": False, "date_string": "01 Jan 2025"}},
    {"messages": [m("system", "Use tools."), m("user", "Weather in Paris?")], "tools": TOOLS, "add_generation_prompt": True},
    {"messages": [m("user", "Weather in 東京?"), m("assistant", None, tool_calls=[call("get_weather", {"city": "東京", "days": 2, "ok": True, "x": None})]), m("tool", "{\"temp\": 21.5}", tool_call_id="abcdefgh1"), m("assistant", "21.5 °C"), m("user", "Thanks")], "tools": TOOLS, "add_generation_prompt": True},
    {"messages": [m("user", "a"), m("assistant", "", tool_calls=[call("add", {"l": [1, 2]}), call("add", "{\"raw\": 1}", "abcdefgh2")]), m("tool", "1", tool_call_id="abcdefgh1"), m("tool", "2", tool_call_id="abcdefgh2")], "tools": TOOLS, "add_generation_prompt": True},
    {"messages": [m("user", "q"), m("assistant", "answer", reasoning_content="because\n"), m("user", "more")], "add_generation_prompt": True},
    {"messages": [m("user", "q"), m("assistant", "answer", reasoning_content="because\n")], "add_generation_prompt": False},
    {"messages": [m("user", "one"), m("user", "two")], "add_generation_prompt": True},
    {"messages": [m("user", "abc"), m("skip", "no"), m("assistant", "défg"), m("stop", "end"), m("user", "never")], "add_generation_prompt": False},
]


def main(folder):
    folder = pathlib.Path(folder)
    out = []
    for path in sorted(folder.glob("*.jinja")):
        template = env.from_string(path.read_text(encoding="utf8"))
        for i, case in enumerate(CASES):
            row = {"template": path.name, **case}
            try:
                row["text"] = template.render(
                    messages=case["messages"], tools=case.get("tools"), documents=None, add_generation_prompt=case["add_generation_prompt"],
                    bos_token="<s>", eos_token="</s>", **case.get("variables", {}))
            except jinja2.exceptions.TemplateError as e:
                row["error"] = str(e)
            except TypeError as e:
                print("not a case:", path.name, i, e)
                continue
            out.append(row)
    dst = folder / "cases.json"
    with open(dst, "w", encoding="ascii") as f:
        f.write('{"bos": "<s>", "eos": "</s>", "unix_seconds": %d, "cases": [\n' % UNIX_SECONDS + ",\n".join(json.dumps(r) for r in out) + "\n]}\n")
    print(len(out), "cases,", sum("error" in r for r in out), "errors")


if __name__ == "__main__":
    main(sys.argv[1])
