"""transformers' common model and configuration tests on our model; run by test_transformers_suite.py."""

import unittest

from torch import nn
from transformers import CLIPConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification


# Only classes in this table get labels and are tested as classifiers.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[MicroCLIPConfig.model_type] = MicroCLIPForImageClassification.__name__


class MicroCLIPModelTester:
    """The sizes that the common tests read, a configuration and a batch."""

    is_training = True
    batch_size = 12
    image_size = 30
    patch_size = 6
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    seq_length = (image_size // patch_size) ** 2 + 1

    def get_config(self):
        tower = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        clip_config = CLIPConfig(
            text_config={**tower, "vocab_size": 99, "max_position_embeddings": 7},
            vision_config={**tower, "image_size": self.image_size, "patch_size": self.patch_size},
            projection_dim=64,
        )
        return MicroCLIPConfig(clip_config=clip_config)

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class MicroCLIPModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MicroCLIPForImageClassification,)
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
        self.model_tester = MicroCLIPModelTester()
        self.config_tester = ConfigTester(
            self,
            config_class=MicroCLIPConfig,
            has_text_modality=False,
            common_properties=["clip_config", "num_labels", "fusion_ratio"],
            fusion_ratio=0.25,
            saliency_threshold=0.1,
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # Images are embedded by a convolution, and the common test wants an nn.Embedding.
        model = MicroCLIPForImageClassification(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), nn.Module)
        embeddings = nn.Identity()
        model.set_input_embeddings(embeddings)
        self.assertIs(model.get_input_embeddings(), embeddings)
        self.assertIsNone(model.get_output_embeddings())
