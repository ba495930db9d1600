"""Small templates of the usual kinds, for tests."""

from data.masking.answers import AnswerFinder
from data.rows.conversation import Conversation
from data.templates.template import ChatTemplate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Writes tool calls, reasoning in a field, and drops reasoning of earlier turns.
THINKING = """\
{%- set ns = namespace(last_query_index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query_index = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- set content = message.content %}
    {%- set reasoning_content = message.reasoning_content or '' %}
    {%- if '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last_query_index %}
        {{- '<think>\\n' + reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function.name + ' ' }}
        {{- call.function.arguments | tojson }}{{ '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Marks the answers itself, its line break after the stop included.
GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def finder(source, **options):
    template = ChatTemplate(source, {"eos_token": "<|im_end|>", "bos_token": "<s>"})
    return AnswerFinder(template, [*SPECIAL, "<s>", "</s>"], **options)


def chat(*texts, **last):
    """user, assistant, user, assistant, ... ; keywords go to the last message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1].update(last)
    return Conversation(messages)
