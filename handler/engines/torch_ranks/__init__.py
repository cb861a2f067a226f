"""The torch engine on several processes of one host: how they meet, and miss each other."""
