"""A model archive as a SageMaker endpoint: made, asked, read and taken away again."""
