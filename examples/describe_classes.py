"""
Let a language model describe the look of classes.

    python examples/describe_classes.py \
        --class_names names.txt \
        --domain "a species of flower" \
        --llm Qwen/Qwen2.5-7B-Instruct \
        --output descriptions.json

`names.txt` has one class name a line. The result is for `--descriptions` of `examples/adapt.py`. The model runs on
this machine; `--base_url http://localhost:8000/v1` asks one behind an OpenAI-compatible endpoint in its place (vLLM,
TGI, llama.cpp, Ollama, hosted ones), whose key is read from the environment variable OPENAI_API_KEY. After an
interruption the same command goes on; `--help` lists every setting.
"""

from microclip_hf.commands.describe import main


if __name__ == "__main__":
    main()
